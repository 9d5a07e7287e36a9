#!/bin/sh
# Makes the bucket, the work pool and the deployments. Safe to run again: what is there stays, or is brought up to date.
set -eu

python - <<'END'
import os

import s3fs

root = os.environ["PIPELINE_ROOT"]
if root.startswith("s3://"):
    bucket = root.removeprefix("s3://").partition("/")[0]
    store = s3fs.S3FileSystem(endpoint_url=os.environ.get("AWS_ENDPOINT_URL") or None)
    if not store.exists(bucket):
        store.mkdir(bucket)
    print(f"bucket {bucket}: there")
END

prefect work-pool create training-data --type process --overwrite
prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
