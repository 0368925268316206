"""A real S3 protocol server on the loopback, and what s3fs needs to find it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "pictures"


@contextmanager
def s3_server(monkeypatch) -> Iterator[object]:
    """Runs moto's server; yields an s3fs file system that has an empty bucket `BUCKET`."""
    import s3fs
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    if files.exists(BUCKET):  # moto keeps its state for the whole process
        files.rm(BUCKET, recursive=True)
    files.mkdir(BUCKET)
    try:
        yield files
    finally:
        s3fs.S3FileSystem.close_session(files.loop, files._s3)
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
