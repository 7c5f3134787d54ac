"""Tests of stf.ops."""
