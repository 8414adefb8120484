"""An S3 server on this machine, its buckets, and stores in them."""

from __future__ import annotations

import contextlib

import boto3
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}


@contextlib.contextmanager
def serving():
    """The address of a server, until this is left."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def make_bucket(endpoint, name):
    """A bucket without objects."""
    client = boto3.client("s3", endpoint_url=endpoint, **KEYS)
    client.create_bucket(Bucket=name)
    client.close()


def store_of(endpoint, name, **options):
    """A bucket as obstore opens it."""
    return S3Store(
        name,
        endpoint=endpoint,
        access_key_id="any",
        secret_access_key="any",
        region="us-east-1",
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
        **options,
    )
