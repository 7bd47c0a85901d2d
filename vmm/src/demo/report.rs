//! What the guest says at its end (see `guest::report`).

use serde::Deserialize;

/// The report line.
#[derive(Clone, Debug, Deserialize)]
pub struct Report {
    /// Bytes that share a generation.
    pub block: u64,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// The phases that it was in.
    pub phases: Vec<Phase>,
}

/// A disk, by the guest's record.
#[derive(Clone, Debug, Deserialize)]
pub struct Disk {
    /// Sectors of the disk in use.
    pub span: u64,
    /// How far generations may be out of order.
    pub lag: u64,
    /// Digest of the record, in hexadecimal.
    pub digest: String,
    /// Requests under way at most.
    pub depth: u32,
    /// Requests that failed.
    pub failed: u64,
    /// Blocks that the guest did not find as it had written them.
    pub bad: u64,
}

/// A phase: numbers of requests, times in microseconds.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Phase {
    /// How long it lasted.
    pub us: u64,
    /// Writes.
    #[serde(default)]
    pub w: u64,
    /// Reads, each checked.
    #[serde(default)]
    pub r: u64,
    /// Half of the writes took no longer.
    pub p50: u64,
    /// 99 of 100 writes took no longer.
    pub p99: u64,
    /// The slowest request.
    pub slowest: u64,
    /// The longest time without an answer while requests were under way.
    pub stall: u64,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The guest could not go on.
    #[error("The guest could not go on: {0}")]
    Guest(String),
    /// The guest did not say anything.
    #[error("The guest ended without a report")]
    Missing,
    /// The report is not what this program expects.
    #[error("The guest's report cannot be read")]
    Malformed(#[from] serde_json::Error),
}

impl Report {
    /// Finds the report in what came from the serial port.
    ///
    /// Errors: there is none, or the guest reports a failure of its own.
    pub fn find(serial: &str) -> Result<Self, ReportError> {
        #[derive(Deserialize)]
        struct Failure {
            error: String,
        }
        let line = serial
            .lines()
            .rev()
            .find(|line| line.starts_with(guest::report::PREFIX))
            .ok_or(ReportError::Missing)?;
        if let Ok(failure) = serde_json::from_str::<Failure>(line) {
            return Err(ReportError::Guest(failure.error));
        }
        Ok(serde_json::from_str(line)?)
    }
}

#[cfg(test)]
mod tests {
    use guest::phase::{Operation, Phases};
    use guest::report::{DiskReport, write_error, write_report};

    use super::*;

    #[test]
    fn the_guests_line_is_found_and_read() {
        let mut phases = Phases::new();
        phases.begin(0);
        phases.current_mut().count(Operation::Write, 4096, 9000);
        phases.end(5_000_000);
        let disk = DiskReport {
            span: 16,
            lag: 3,
            digest: 0x1f,
            depth: 32,
            ..DiskReport::default()
        };
        let mut serial = String::from("noise\n");
        write_report(&mut serial, 4096, 1, [disk].into_iter(), phases.begun()).unwrap();
        let report = Report::find(&serial).unwrap();
        assert_eq!(report.disks[0].digest, "000000000000001f");
        assert_eq!(report.disks[0].lag, 3);
        assert_eq!(report.phases[0].w, 1);
        assert_eq!(report.phases[0].slowest, 9);
    }

    #[test]
    fn a_failure_of_the_guest_is_told() {
        let mut serial = String::new();
        write_error(&mut serial, format_args!("Fault 14")).unwrap();
        let error = Report::find(&serial).unwrap_err();
        assert_eq!(error.to_string(), "The guest could not go on: Fault 14");
    }

    #[test]
    fn silence_is_an_error() {
        assert!(matches!(Report::find("x\n"), Err(ReportError::Missing)));
    }
}
