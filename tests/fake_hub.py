"""A small Hugging Face hub on loopback, with what huggingface_hub asks of it to download a model.

As the real one does, it lists a gated repository's files to everybody but hands them out only for a token;
it keeps large files on another server, which refuses a token, and answers Range requests. It can be told to
break off, to fail and to hang.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import types

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = 4096  # bytes from which a file is kept on the other server, as with Git LFS


def listing(repo, files, with_sizes):
    """What /api/models/REPO answers; sizes and checksums only for those who ask for them."""
    siblings = []
    for path, content in files.items():
        about = {"rfilename": path}
        if with_sizes:
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            about |= {"size": len(content), "blobId": blob}
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
        siblings.append(about)
    return {"id": repo, "sha": COMMIT, "siblings": siblings}


class Handler(http.server.BaseHTTPRequestHandler):
    """Both servers: the hub itself (/api/models/REPO, /REPO/resolve/COMMIT/PATH), the one of large files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", length=None, **headers):
        self.send_response(status)
        headers["Content_Length"] = len(content) if length is None else length
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        hub.requests.append((self.command, path, self.headers["Range"]))
        if hub.instead is not None and hub.instead(self, path):
            return
        if hub.page is not None:
            return self.answer(200, hub.page)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            if match[1] not in hub.repos:
                return self.answer(401, b'{"error": "Invalid username or password."}')
            return self.answer(
                200, json.dumps(listing(match[1], hub.repos[match[1]], "blobs=" in query)).encode()
            )
        match = re.fullmatch(r"(/large)?/([^/]+/[^/]+)/resolve/" + COMMIT + "/(.+)", path)
        if not match or match[3] not in hub.repos.get(match[2], {}):
            return self.answer(404, X_Error_Code="EntryNotFound")
        large, repo, name = match.groups()
        content, token = hub.repos[repo][name], self.headers["Authorization"]
        if large:
            return self.answer(400) if token else self.hand_out(name, content)
        if repo in hub.gated and token != f"Bearer {hub.token}":
            error = "Access to this model is restricted" if token else "Please log in"
            return self.answer(
                403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message=error
            )
        about = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        if len(content) < LARGE:
            return self.hand_out(name, content, **about)
        about |= {
            "X_Linked_Size": len(content),
            "X_Linked_ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self.answer(302, Location=f"{hub.large_url}/large{path}", **about)

    do_GET = do_HEAD

    def hand_out(self, name, content, **headers):
        """The file, or the part asked for; or as much of it as its next fault lets through."""
        hub, faults, begin, end = (
            self.server.hub,
            self.server.hub.faults.get(name, []),
            0,
            len(content),
        )
        kind, number = faults.pop(0) if faults and self.command == "GET" else (None, None)
        if kind == "fail":
            return self.answer(number)
        if kind == "spoil":
            content = content[:number] + b"spoilt" + content[number + 6 :]
        if self.headers["Range"]:
            begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            headers["Content_Range"] = f"bytes {begin}-{end - 1}/{end}"
        sent = content[begin : number if kind in ("cut", "hang") else end]
        self.answer(206 if begin else 200, sent, length=end - begin, **headers)
        if kind == "hang":
            hub.over.wait(60)
        self.close_connection = self.close_connection or kind in ("cut", "hang")


@contextlib.contextmanager
def fake_hub(repos, gated=(), token="hf_right"):
    """A running hub. repos: name -> path -> bytes. Gone, with its threads, at the end of the with block.

    Of what it yields: url; requests, a list of (method, path, Range header); page, an answer to give
    instead of all others; instead, a function of the handler and the path that answers, or returns False;
    faults, which a test fills: by file name a list of (kind, number), one for each coming GET. ("cut", n)
    ends the connection after byte n, ("hang", n) sends nothing more after it, ("spoil", n) changes some
    bytes there, ("fail", n) answers with status n.
    """
    hub = types.SimpleNamespace(
        repos=repos,
        gated=gated,
        token=token,
        requests=[],
        faults={},
        page=None,
        instead=None,
        over=threading.Event(),
    )
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.url, hub.large_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for server, thread in zip(servers, threads):
        server.hub, server.daemon_threads, server.block_on_close = hub, True, False
        thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        for server, thread in zip(servers, threads):
            server.shutdown()
            server.server_close()
            thread.join()
