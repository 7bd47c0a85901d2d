//! `diptych job list`

use super::error::JobError;
use super::jobs::Job;
use super::report::{Report, clean, percent, size};
use super::server::Server;
use super::status;

const HEAD: [&str; 7] = ["ID", "TYPE", "STATUS", "DONE", "BYTES", "LIMIT", "ERROR"];

/// A table of the jobs; with JSON, an object for each.
pub fn run(server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    let jobs = server.jobs()?;
    if report.is_json() {
        for job in &jobs {
            report.object(&job.raw)?;
        }
        return Ok(status::DONE);
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(jobs.iter().map(row));
    for line in table(&rows) {
        report.line(&line)?;
    }
    Ok(status::DONE)
}

fn row(job: &Job) -> [String; 7] {
    let limit = match job.speed {
        0 => "-".to_owned(),
        speed => format!("{}/s", size(speed)),
    };
    [
        clean(&job.id),
        clean(&job.kind),
        clean(&job.status),
        format!("{} %", percent(job.current, job.total)),
        format!("{} of {}", size(job.current), size(job.total)),
        limit,
        job.error.as_deref().map_or("-".to_owned(), clean),
    ]
}

/// Lines whose columns are as wide as their widest cell.
pub fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(widths);
            let line: Vec<String> = cells
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            line.join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_of_the_servers_steers_the_terminal() {
        let job = Job {
            id: "j\u{1b}[2J".to_owned(),
            kind: "mirror".to_owned(),
            status: "running".to_owned(),
            current: 1 << 20,
            total: 4 << 20,
            speed: 1 << 10,
            ..Job::default()
        };
        let rows = [HEAD.map(str::to_owned), row(&job)];
        assert_eq!(
            table(&rows),
            [
                "ID          TYPE    STATUS   DONE  BYTES                 LIMIT       ERROR",
                "j\\u{1b}[2J  mirror  running  25 %  1.00 MiB of 4.00 MiB  1.00 KiB/s  -",
            ]
        );
    }
}
