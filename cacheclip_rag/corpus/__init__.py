"""The chunks of an ingestion: encoded, fused with their neighbours, counted, and forgotten."""
