"""The ingestion of chunks: encoding, fusing, usage counts and forgetting."""
