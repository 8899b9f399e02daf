"""A read-only S3 store on loopback that answers late: what an object store at a distance does to a reader.

    python benchmarks/slow_store.py FOLDER [--latency 0.03]     # prints its address

Knows GET (with Range), HEAD and LIST, which is all that reading takes; folders of FOLDER are buckets. ``GET /requests``
tells how many GETs of objects there were, and how many bytes they brought.
"""

import argparse
import asyncio
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web


def make_app(folder: Path, latency: float) -> web.Application:
    counts = {"requests": 0, "bytes": 0}

    async def requests(_: web.Request) -> web.Response:
        return web.json_response(counts)

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency)
        path = (folder / request.match_info["path"].strip("/")).resolve()
        if not path.is_relative_to(folder):
            return web.Response(status=403)
        if path.is_dir():
            return listing(path, request.query.get("prefix", ""))
        if not path.is_file():
            return web.Response(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>", content_type="text/xml")
        size, span = path.stat().st_size, request.http_range
        start, stop = span.start or 0, min(size if span.stop is None else span.stop, size)
        if start >= size and size:
            return web.Response(status=416, body=b"<Error><Code>InvalidRange</Code></Error>", content_type="text/xml")
        headers = {"ETag": f'"{size}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(size)})
        counts["requests"] += 1
        counts["bytes"] += stop - start
        if "Range" in request.headers:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        return web.Response(status=206 if "Range" in request.headers else 200, body=body, headers=headers)

    app = web.Application()
    app.router.add_get("/requests", requests)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def listing(bucket: Path, prefix: str) -> web.Response:
    """The objects right below ``prefix``, as ListObjectsV2 with a delimiter."""
    entries = []
    for path in sorted((bucket / prefix).iterdir() if (bucket / prefix).is_dir() else ()):
        key = escape(str(path.relative_to(bucket)))
        if path.is_dir():
            entries.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
        else:
            date, size = "2026-01-01T00:00:00.000Z", path.stat().st_size
            entries.append(
                f"<Contents><Key>{key}</Key><LastModified>{date}</LastModified><Size>{size}</Size></Contents>"
            )
    head = f"<Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
    text = f"<?xml version='1.0'?><ListBucketResult>{head}{''.join(entries)}</ListBucketResult>"
    return web.Response(text=text, content_type="text/xml")


async def serve(folder: Path, latency: float) -> None:
    runner = web.AppRunner(make_app(folder.resolve(), latency), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer")
    options = parser.parse_args()
    asyncio.run(serve(options.folder, options.latency))
