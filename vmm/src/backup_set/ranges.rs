//! Which parts of a disk an incremental backup holds: a text file of one line per range,
//! `OFFSET LENGTH` in bytes, in order and apart.

use std::ops::Range;

/// A larger list is not ours.
pub const MAX_BYTES: u64 = 1 << 30;

/// The list as text.
pub fn to_text(ranges: &[Range<u64>]) -> String {
    let lines = ranges
        .iter()
        .map(|range| format!("{} {}\n", range.start, range.end - range.start));
    lines.collect()
}

/// Reads a list for a disk of `size` bytes.
///
/// Errors: what is wrong with it, in words for after a colon.
pub fn parse(text: &[u8], size: u64) -> Result<Vec<Range<u64>>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let wrong = |why: &str| format!("line {} {why}", number + 1);
        let (offset, len) = line
            .split_once(' ')
            .and_then(|(offset, len)| Some((decimal(offset)?, decimal(len)?)))
            .ok_or_else(|| wrong("is not two numbers"))?;
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.ok_or_else(|| wrong("reaches past the end of the disk"))?;
        let after = ranges.last().map_or(0, |last| last.end);
        if len == 0 || offset < after {
            return Err(wrong("is empty, or not after the one before"));
        }
        ranges.push(offset..end);
    }
    Ok(ranges)
}

fn decimal(text: &str) -> Option<u64> {
    // No sign: what Rust's own parser would let pass.
    let fits = text.bytes().all(|byte| byte.is_ascii_digit());
    fits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        for ranges in [
            vec![],
            vec![0..512, 1024..1025],
            vec![0..4096, 4096..8192, 9000..10_000],
        ] {
            let text = to_text(&ranges);
            assert_eq!(parse(text.as_bytes(), 10_000), Ok(ranges));
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in [
            "x",
            "1",
            "1 2 3",
            "1 -2",
            "+1 2",
            "0 0",
            "5 10\n0 2",
            "0 10\n9 2",
            "0 101",
            "18446744073709551615 2",
            "99999999999999999999 1",
            "\n",
        ] {
            assert!(parse(text.as_bytes(), 100).is_err(), "{text:?}");
        }
        assert!(parse(b"\xff 1", 100).is_err());
    }
}
