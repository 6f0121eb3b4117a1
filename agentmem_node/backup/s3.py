"""Objects in an S3-compatible bucket, through boto3 (the extra `s3`).

Credentials come from where boto3 looks for them: the environment, ~/.aws, the machine's role.
They never stand in the URL, which is shown in logs and answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import SplitResult, unquote

from agentmem_node.backup.errors import BackupDestination, BackupUnreachable
from agentmem_node.backup.objects import ObjectInfo, checked, missing, parameters

_KNOWN: Final = frozenset({"endpoint", "region"})
_CONNECT_S: Final = 5.0
_READ_S: Final = 60.0
_ATTEMPTS: Final = 4
_ABSENT: Final = ("404", "NoSuchKey", "NotFound")
_THERE: Final = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")


class S3Store:
    """S3 shows an object only when all of it has arrived, and lists it from then on."""

    def __init__(self, client: Any, bucket: str, prefix: str, url: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    def put(self, name: str, data: bytes) -> None:
        self._call("put_object", Key=self._key(name), Body=data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        # Asked first: most stores would take the whole body before they refuse it.
        if self.exists(name):
            return False
        try:
            self._call("put_object", Key=self._key(name), Body=data, IfNoneMatch="*")
        except _Answer as answer:
            if answer.s3_code in _THERE:
                return False
            raise answer.error() from answer
        return True

    def get(self, name: str) -> bytes:
        from botocore.exceptions import BotoCoreError

        try:
            answer = self._call("get_object", Key=self._key(name))
        except _Answer as refused:
            if refused.s3_code in _ABSENT:
                raise missing(name, self._url) from None
            raise refused.error() from refused
        try:
            data: bytes = answer["Body"].read()
        except (BotoCoreError, OSError) as error:
            raise self._unreachable(str(error)) from error
        return data

    def exists(self, name: str) -> bool:
        try:
            self._call("head_object", Key=self._key(name))
        except _Answer as refused:
            if refused.s3_code in _ABSENT:
                return False
            raise refused.error() from refused
        return True

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        more: dict[str, str] = {"StartAfter": self._prefix + after} if after else {}
        cut = len(self._prefix)
        while True:
            answer = self._call("list_objects_v2", Prefix=self._prefix + prefix, **more)
            for item in answer.get("Contents", ()):
                modified_ms = int(item["LastModified"].timestamp() * 1000)
                yield ObjectInfo(item["Key"][cut:], item["Size"], modified_ms)
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, name: str) -> None:
        self._call("delete_object", Key=self._key(name))

    def sweep(self, before_ms: int) -> None:
        """A bucket keeps nothing of an upload that did not end."""

    # -- within ---------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return self._prefix + checked(name)

    def _call(self, operation: str, **arguments: Any) -> Any:
        """Raises _Answer, which is a BackupUnreachable too, and BackupUnreachable."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except ClientError as error:
            told = error.response.get("Error", {})
            raise _Answer(self._url, str(told.get("Code", "")), str(error)) from error
        except (BotoCoreError, OSError) as error:
            raise self._unreachable(str(error)) from error

    def _unreachable(self, why: str) -> BackupUnreachable:
        return _unreachable(self._url, why)


class _Answer(BackupUnreachable):
    """The bucket answered, with an error. `code`: S3's own."""

    def __init__(self, url: str, code: str, text: str) -> None:
        made = _unreachable(url, text)
        super().__init__(made.message, hint=made.hint)
        # Not named `code`: that is the class's own, for programs.
        self.s3_code = code

    def error(self) -> BackupUnreachable:
        return BackupUnreachable(self.message, hint=self.hint)


def _unreachable(url: str, why: str) -> BackupUnreachable:
    return BackupUnreachable(
        f"The bucket {url} does not do what is asked: {why.strip().rstrip('.')}.",
        hint="It must exist, every node must reach it, and AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY (or a role) must allow to list, read, write and delete in it.",
    )


def open_s3(url: str, split: SplitResult) -> S3Store:
    """Raises BackupDestination; the bucket itself is not asked yet."""
    given = parameters(url, split, _KNOWN)
    bucket = split.netloc
    if not bucket or "@" in bucket:
        raise BackupDestination(
            "The URL of a bucket is s3://BUCKET/PREFIX, without credentials.",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node.",
        )
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError:
        raise BackupDestination(
            "Backups to s3:// need the package boto3, which is not installed on this node.",
            hint="pip install 'agentmem-cluster[node,s3]' on every node.",
        ) from None
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=given.get("endpoint"),
            region_name=given.get("region") or "us-east-1",
            config=Config(
                connect_timeout=_CONNECT_S,
                read_timeout=_READ_S,
                retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
                # Own endpoints seldom have a name for each bucket.
                s3={"addressing_style": "path" if given.get("endpoint") else "auto"},
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise BackupDestination(
            f"The bucket {url.partition('?')[0]} cannot be used: {error}."
        ) from error
    prefix = unquote(split.path).strip("/")
    return S3Store(client, bucket, f"{prefix}/" if prefix else "", url)
