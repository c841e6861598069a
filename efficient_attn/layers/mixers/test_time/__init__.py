"""Mixers whose state is a model trained at test time."""

TEST_TIME = {}
