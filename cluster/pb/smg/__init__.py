"""Generated from protos/ by .ci/protos; do not edit."""
