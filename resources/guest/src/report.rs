//! The one line that the guest says at its end: JSON, on the serial port.
//!
//! Short keys, because each byte costs an exit, and on some hosts a slow one.
//! Times are in microseconds; see `resources/guest/README.md`.

use core::fmt::{self, Write};

use crate::phase::{Operation, Phase};
use crate::sector::Damage;

/// Marks the line among what else may be on a serial port.
pub const PREFIX: &str = "{\"diptych\":1,";

/// A block that did not read as the record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Number of the block.
    pub block: u64,
    /// Generation by the record.
    pub expected: u64,
    /// Generation found, or how the block is damaged.
    pub found: Result<u64, Damage>,
}

/// What is told of a disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskReport {
    /// Size of the disk, in sectors.
    pub sectors: u64,
    /// How much of it was used, in sectors.
    pub span: u64,
    /// Newest generation handed out.
    pub last_generation: u64,
    /// The most writes begun between the beginning and the end of one write:
    /// how far generations can be out of order.
    pub lag: u64,
    /// Digest of the record (see [`crate::record::Digest`]).
    pub digest: u64,
    /// Requests that the device failed.
    pub failed: u64,
    /// Blocks that did not read as the record says.
    pub mismatches: u64,
    /// The first of them.
    pub first: Option<Mismatch>,
    /// Queues in use.
    pub queues: u16,
    /// Requests under way at most, over all queues.
    pub depth: u32,
}

/// Writes the line, with the line feed.
///
/// Errors: those of `out`.
pub fn write_report(
    out: &mut impl Write,
    block: u64,
    tsc_khz: u64,
    disks: impl Iterator<Item = DiskReport>,
    phases: &[Phase],
) -> fmt::Result {
    write!(
        out,
        "{PREFIX}\"tsc_khz\":{tsc_khz},\"block\":{block},\"disks\":["
    )?;
    for (i, disk) in disks.enumerate() {
        if i > 0 {
            out.write_char(',')?;
        }
        write_disk(out, &disk)?;
    }
    out.write_str("],\"phases\":[")?;
    for (i, phase) in phases.iter().enumerate() {
        if i > 0 {
            out.write_char(',')?;
        }
        write_phase(out, phase)?;
    }
    out.write_str("]}\n")
}

/// Writes the line that is said instead when the guest cannot go on.
///
/// Errors: those of `out`.
pub fn write_error(out: &mut impl Write, message: fmt::Arguments<'_>) -> fmt::Result {
    write!(out, "{PREFIX}\"error\":\"")?;
    write!(Quoted(out), "{message}")?;
    out.write_str("\"}\n")
}

/// Passes text on as the inside of a JSON string, with a `?` for whatever
/// would have to be escaped.
struct Quoted<'a, W>(&'a mut W);

impl<W: Write> Write for Quoted<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let plain = (' '..='~').contains(&c) && c != '"' && c != '\\';
            self.0.write_char(if plain { c } else { '?' })?;
        }
        Ok(())
    }
}

fn write_disk(out: &mut impl Write, disk: &DiskReport) -> fmt::Result {
    write!(
        out,
        "{{\"sectors\":{},\"span\":{},\"last\":{},\"lag\":{},\"digest\":\"{:016x}\",\
         \"queues\":{},\"depth\":{},\"failed\":{},\"bad\":{}",
        disk.sectors,
        disk.span,
        disk.last_generation,
        disk.lag,
        disk.digest,
        disk.queues,
        disk.depth,
        disk.failed,
        disk.mismatches
    )?;
    if let Some(first) = disk.first {
        write!(
            out,
            ",\"first\":{{\"block\":{},\"expected\":{},",
            first.block, first.expected
        )?;
        match first.found {
            Ok(generation) => write!(out, "\"found\":{generation}}}")?,
            Err(damage) => write!(out, "\"damage\":\"{}\"}}", damage.as_str())?,
        }
    }
    out.write_char('}')
}

fn write_phase(out: &mut impl Write, phase: &Phase) -> fmt::Result {
    const KEYS: [(&str, Operation); 5] = [
        ("w", Operation::Write),
        ("r", Operation::Read),
        ("f", Operation::Flush),
        ("d", Operation::Discard),
        ("z", Operation::WriteZeroes),
    ];
    write!(
        out,
        "{{\"us\":{}",
        phase.end_ns.saturating_sub(phase.start_ns) / 1000
    )?;
    for (key, operation) in KEYS {
        let n = phase.requests[operation.index()];
        if n > 0 {
            write!(out, ",\"{key}\":{n}")?;
        }
    }
    write!(
        out,
        ",\"bytes\":{},\"p50\":{},\"p99\":{},\"slowest\":{},\"stall\":{}}}",
        phase.written_bytes,
        phase.writes.percentile_ns(500) / 1000,
        phase.writes.percentile_ns(990) / 1000,
        phase.slowest_ns / 1000,
        phase.stall_ns / 1000
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::phase::Phases;

    #[test]
    fn an_error_is_json_whatever_it_says() {
        let mut line = String::new();
        write_error(&mut line, format_args!("a \"b\"\\\n{}", 'ß')).unwrap();
        let report: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(report["error"], "a ?b????");
    }

    #[test]
    fn the_line_is_json_with_all_that_was_counted() {
        let mut phases = Phases::new();
        phases.begin(1_000_000);
        phases.current_mut().count(Operation::Write, 4096, 50_000);
        phases.enter(1, 3_000_000);
        phases.current_mut().stalled(7_000);
        let disks = [
            DiskReport {
                sectors: 16,
                span: 8,
                digest: 0xab,
                ..DiskReport::default()
            },
            DiskReport {
                mismatches: 2,
                first: Some(Mismatch {
                    block: 3,
                    expected: 9,
                    found: Ok(8),
                }),
                ..DiskReport::default()
            },
            DiskReport {
                first: Some(Mismatch {
                    block: 3,
                    expected: 9,
                    found: Err(Damage::Torn(1, 2)),
                }),
                ..DiskReport::default()
            },
        ];
        let mut line = String::new();
        write_report(
            &mut line,
            4096,
            2_000_000,
            disks.into_iter(),
            phases.begun(),
        )
        .unwrap();
        assert!(line.starts_with(PREFIX) && line.ends_with("}\n"));
        let report: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(report["disks"][0]["digest"], "00000000000000ab");
        assert_eq!(report["disks"][0]["first"], Value::Null);
        assert_eq!(
            report["disks"][1]["first"],
            json!({"block": 3, "expected": 9, "found": 8})
        );
        assert_eq!(report["disks"][2]["first"]["damage"], "torn");
        assert_eq!(
            report["phases"][0],
            json!({"us": 2000, "w": 1, "bytes": 4096, "p50": 50, "p99": 50, "slowest": 50, "stall": 0})
        );
        assert_eq!(report["phases"][1]["stall"], 7);
    }
}
