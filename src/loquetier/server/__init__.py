"""The HTTP server: OpenAI-compatible answers over one `Runtime`, vLLM-compatible adapter loading.

Nothing here is imported by the rest of the package, which runs without the web packages.
"""
