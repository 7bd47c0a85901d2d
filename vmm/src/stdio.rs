//! Lines for people on stderr and results on stdout, which may be closed, full or
//! a pipe that nobody reads: the standard macros panic then, and a guest or a
//! daemon must not end for that.

use std::fmt;
use std::io::{self, Write};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long the last words of a process may take.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Prints a line on stderr. If that cannot be, nobody is there to be told.
pub(crate) fn complain(line: fmt::Arguments<'_>) {
    // One write, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// As [`complain`], when the process is about to end: also a stderr that does not take
/// the line does not keep it.
pub(crate) fn complain_at_the_end(line: String) {
    let (said, heard) = mpsc::channel();
    let speaker = thread::Builder::new().spawn(move || {
        complain(format_args!("{line}"));
        // Nobody listens if it took too long.
        let _ = said.send(());
    });
    if speaker.is_ok() {
        // Said, or not.
        let _ = heard.recv_timeout(LAST_WORDS);
    }
}

/// Prints a line on stdout.
///
/// Errors: nobody reads it, or it cannot be written.
pub(crate) fn print_line(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(line.as_bytes())?;
    stdout.write_all(b"\n")?;
    stdout.flush()
}
