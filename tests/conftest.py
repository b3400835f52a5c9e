"""Shared by all tests: one thread, no network, no chatter."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notices about torchvision, which nothing here needs

import diffusers

diffusers.utils.logging.set_verbosity_error()
