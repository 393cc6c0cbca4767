"""Request bodies: read whole, up to a limit, from clients that may be slow or hostile."""

import asyncio

from fastapi import Request

from openinteractions.errors import Invalid, TooLarge


async def read(request: Request, *, max_bytes: int, silence_s: float) -> bytes:
    """The whole body.

    Args:
        request: Whose.
        max_bytes: More than this is refused, before it is read where the client says so.
        silence_s: Longest wait for its next piece.

    Raises:
        TooLarge: It is longer than allowed.
        Invalid: The client stopped sending, or its Content-Length is no number.
    """
    declared = request.headers.get("content-length")
    if declared is not None:
        if not declared.isascii() or not declared.isdigit():
            raise Invalid("The Content-Length header is not a number.")
        if int(declared) > max_bytes:
            raise TooLarge(f"The request body is larger than {max_bytes} bytes.")
    chunks: list[bytes] = []
    size = 0
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(silence_s) as silence:
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise TooLarge(f"The request body is larger than {max_bytes} bytes.")
                chunks.append(chunk)
                silence.reschedule(clock() + silence_s)
    except TimeoutError:
        raise Invalid(f"The request body paused for more than {silence_s:g} s.") from None
    return b"".join(chunks)
