"""Leaves that several folders of examples share: files, shards, processes. They import no other."""
