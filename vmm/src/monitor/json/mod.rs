//! QMP's dialect of JSON: bytes from a client to values, values to bytes.
//!
//! QEMU's monitor accepts a little more than JSON (single quotes) and answers
//! each mistake with a text of its own, so its reader is not `serde_json`'s:
//! [`Reader`] splits a byte stream into messages, resynchronises after rubbish,
//! and never holds more than [`Limits`] allow. Values are `serde_json`'s.
//! What the values mean is not known here.

mod lexer;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

pub(super) use reader::{Limits, Reader};
pub(super) use writer::write_line;

/// Why bytes from a client are not a message; its text is the reply's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum JsonError {
    /// Bytes that are no token, or tokens in the wrong place.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// A message bigger than this monitor reads.
    #[error("JSON token size limit exceeded")]
    Size,
    /// More tokens in a message than this monitor reads.
    #[error("JSON token count limit exceeded")]
    Tokens,
    /// Arrays and objects nested too deeply.
    #[error("JSON nesting depth limit exceeded")]
    Depth,
}
