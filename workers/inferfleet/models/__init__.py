"""The model repository: versions, manifests, verification."""
