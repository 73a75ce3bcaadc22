"""What Schemathesis does not know by itself. It loads this file by SCHEMATHESIS_HOOKS."""

import schemathesis


@schemathesis.deserializer("text/plain")
def text(_context: schemathesis.DeserializationContext, response: schemathesis.Response) -> str:
    """An id as text is the whole body: links take it from there, and it is held against the document's `string`."""
    return response.text
