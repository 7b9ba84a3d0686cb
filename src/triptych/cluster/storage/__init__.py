"""What outlives a process: jobs, and the blobs that are kept for them."""

__all__: list[str] = []
