"""Clients of a Triptych server: submit a job, follow it, fetch what it made. Free of torch."""

from triptych.client.aio import AsyncClient, AsyncRemoteJob
from triptych.client.shared import JobUpdate, RemoteFile, RemoteResult
from triptych.client.sync import Client, RemoteJob

__all__ = ["AsyncClient", "AsyncRemoteJob", "Client", "JobUpdate", "RemoteFile", "RemoteJob", "RemoteResult"]
