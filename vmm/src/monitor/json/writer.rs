//! Values to a line for the client, spaced as QEMU spaces them (scripts that
//! grep for `"return": {}` exist) and in ASCII.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// `value` as one line, with QMP's CRLF at its end.
pub(in crate::monitor) fn write_line(value: &impl Serialize) -> Vec<u8> {
    let mut line = Vec::with_capacity(128);
    let mut serializer = Serializer::with_formatter(&mut line, Spaced);
    // Neither a Vec nor our own types can fail; an empty line is harmless.
    if let Err(error) = value.serialize(&mut serializer) {
        tracing::error!(%error, "A QMP message could not be written");
        line.clear();
    }
    line.extend_from_slice(b"\r\n");
    line
}

/// `{"a": 1, "b": 2}`, everything outside ASCII as `\uXXXX`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for character in fragment.chars() {
            if matches!(character, ' '..='~') {
                writer.write_all(&[character as u8])?;
            } else {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04X}")?;
                }
            }
        }
        Ok(())
    }
}

fn separate<W: ?Sized + Write>(writer: &mut W, first: bool) -> io::Result<()> {
    if first {
        Ok(())
    } else {
        writer.write_all(b", ")
    }
}
