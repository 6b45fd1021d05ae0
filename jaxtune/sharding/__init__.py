"""Devices as a mesh, and which axis of an array lies along which axis of the mesh."""
