"""CKA of s3prl upstreams."""
