"""A wire to a service on 127.0.0.1, that counts what is asked over it and can be cut."""

import http.client
import re
import socket
import threading
from collections import Counter
from contextlib import suppress
from urllib.parse import quote


def said(status, code, message):
    """Spell an answer of S3 that refuses."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


class Wire:
    """A wire to a service that counts what is asked over it, and can be cut."""

    def __init__(self, port):
        self.port, self.asked = port, Counter()
        self.refusals = 0  # connections that are cut at once
        self.breaks = 0  # answers that are cut in their middle
        self.busy = 0  # requests that are answered by `answer` instead
        self.answer = said("503 Slow Down", "SlowDown", "Please reduce your request rate.")
        self.down = False
        self._open = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                caller = self._server.accept()[0]
            except OSError:
                return
            if self.down or self.refusals > 0:
                self.refusals -= 1
                caller.close()
                continue
            there = socket.create_connection(("127.0.0.1", self.port))
            self._open |= {caller, there}
            for pair in ((caller, there, True), (there, caller, False)):
                self._threads.append(threading.Thread(target=self._pass, args=pair))
                self._threads[-1].start()

    def _pass(self, source, sink, asks):
        try:
            while data := source.recv(1 << 20):
                if self.down:
                    break
                if asks and self.busy > 0:
                    self.busy -= 1
                    source.sendall(self.answer)
                    while source.recv(1 << 20):
                        pass
                    break
                if asks:
                    self.asked.update(f"{verb.decode()} {path.decode()}" for verb, path in
                                      re.findall(rb"(GET|HEAD|PUT|POST|DELETE) /(\S*) HTTP", data))  # fmt: skip
                elif self.breaks > 0 and b"IEND" in data:
                    self.breaks -= 1
                    sink.sendall(data[:-20])
                    break
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def bodies(self):
        """Return how often each object was transferred since the last call."""
        got = Counter({path: count for path, count in self.asked.items()
                       if path.startswith("GET ") and "list-type" not in path})  # fmt: skip
        self.asked.clear()
        return got

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._open:
            one.close()


def put(wire, path, body=b""):
    """Upload an object, or make a bucket."""
    connection = http.client.HTTPConnection("127.0.0.1", wire.port)
    connection.request(
        "PUT",
        quote(path),
        body,
        {"Authorization": "AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/20260101/us-east-1/s3/aws4"},
    )
    assert connection.getresponse().status == 200
    connection.close()
