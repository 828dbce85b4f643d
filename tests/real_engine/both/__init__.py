"""Tests that run in either environment, without a server."""
