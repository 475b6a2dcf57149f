"""Prefill, decoding with a growing cache, sampling."""
