"""HTTP: documents in, answers out.

`access` and `chunks` serve any engine behind an OpenAI-compatible application, vLLM's own among them; `openai` and
`embedded` are this library's engine behind the same endpoints, and `app` puts all of it together. Only this package
imports FastAPI (the extra ``serve``); `client` needs httpx alone.
"""
