"""A model as an HTTP service: requests are evaluated together, in a process of its own.

`server.serve` runs it; `cmfast serve` is the command. It needs the extra `serve`: FastAPI, uvicorn and the Prometheus
client, which nothing else of cmfast imports.
"""
