"""Where a run may lie besides a folder: in a .zip file, or in an object store such as S3."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import zarr.storage

from interp.stores.errors import StoreError
from interp.stores.identity import check_root
from interp.stores.safety import check_safe

SCHEMES = ("s3://", "gs://", "az://", "abfs://", "http://", "https://")


def zarr_store(text: str) -> Any:
    """Return a read-only Zarr store for an address or a .zip file, whose root is that of a run.

    Credentials and endpoint of S3 come from the usual variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
    AWS_ENDPOINT_URL.

    Raises:
        StoreError: nothing can be read there, or it is no run.
    """
    if "://" not in text:
        store, root = _zip(text)
    else:
        store, root = _object_store(text)
    try:
        document = json.loads(root)
    except ValueError:
        raise StoreError(f"{text}/zarr.json cannot be read, so this is not a run") from None
    check_root(text, document, "give the address of a run that trace(store=...) or interp run wrote")
    check_safe(text, document)
    return store


def _zip(text: str) -> tuple[Any, bytes]:
    if not Path(text).is_file():
        raise StoreError(f"there is no run at {text}; give a .zip file made of the contents of a run's folder")
    try:
        with zipfile.ZipFile(text) as file:
            names = set(file.namelist())
            if "zarr.json" not in names:
                raise StoreError(
                    f"{text} has no zarr.json at its top, so it is not a run; zip the contents of the run's folder "
                    "(cd run.zarr; zip -0 -r ../run.zarr.zip .)"
                )
            if file.getinfo("zarr.json").file_size > 1 << 28:
                raise StoreError(f"{text} has a zarr.json of more than 256 MiB, so it is not a run")
            root = file.read("zarr.json")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{text} could not be read as a .zip file: {error}") from None
    return zarr.storage.ZipStore(text, mode="r"), root


def _object_store(text: str) -> tuple[Any, bytes]:
    if not text.startswith(SCHEMES):
        raise StoreError(f"cannot read from {text!r}; an address begins with one of {', '.join(SCHEMES)}")
    try:
        import obstore
        from obstore.store import from_url
    except ImportError:
        raise StoreError(f"{text} needs the package obstore: pip install 'interp-diffusion[s3]'") from None
    options: Any = {}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options = {"client_options": {"allow_http": True}}
    try:
        store = from_url(text.rstrip("/"), **options)
        root = bytes(obstore.get(store, "zarr.json").bytes())
    except FileNotFoundError:
        raise StoreError(f"there is no run at {text}; it has no zarr.json") from None
    except Exception as error:  # obstore has a dozen types for what a network can do
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StoreError(f"{text} could not be read: {first}") from None
    return zarr.storage.ObjectStore(store, read_only=True), root
