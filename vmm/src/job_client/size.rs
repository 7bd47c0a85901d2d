//! Numbers of bytes as people write them.

use std::str::FromStr;

/// A number of bytes, with K, M, G or T behind it where that is shorter (KiB, …
/// mean the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text.get(digits.len()..).unwrap_or_default() {
            "" | "B" => Some(0),
            "k" | "K" | "KiB" => Some(10),
            "M" | "MiB" => Some(20),
            "G" | "GiB" => Some(30),
            "T" | "TiB" => Some(40),
            _ => None,
        };
        // No sign: what Rust's own parser would let pass. QMP's numbers are signed.
        shift
            .filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift))
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .map(Self)
            .ok_or_else(|| {
                format!("'{text}' is no number of bytes; give one as 4096, 64K, 100M or 1G")
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_bounds() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("3MiB", 3 << 20),
            ("1G", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "+1",
            "1.5M",
            "1 M",
            "1Q",
            "ä",
            "1ä",
            "9223372036854775808",
            "8388608T",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
