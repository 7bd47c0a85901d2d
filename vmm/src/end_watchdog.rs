//! Sees to it that a process that is ending ends: within a time limit, and at
//! once for a user who asks again. What the end consists of is the caller's.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::low_level::pipe;

use crate::signals::END_SIGNALS;
use crate::terminal;

/// Signals that come so soon after the first say the same: a terminal that is
/// closed sends SIGHUP twice, and that must not cost a flush.
const SAME_WISH: Duration = Duration::from_millis(500);

/// Why the process ends here and now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    TimeUp,
    AskedAgain,
}

/// Starts to watch the end of the process, which has begun. Storage that hangs
/// is left as a crash would leave it after `limit`, or when a signal comes
/// although one (`by_signal`, or since) has come already: then the terminal is
/// restored, a line says why, and the status is 1.
///
/// Once per process; it watches until the process is gone.
pub(crate) fn start(limit: Duration, by_signal: bool) {
    let watching = listen().and_then(|signals| {
        thread::Builder::new()
            .name("end-watchdog".to_owned())
            .spawn(move || give_up(watch(signals, limit, by_signal), limit))
    });
    if let Err(error) = watching {
        tracing::error!(%error, "Nobody watches how long the end takes");
    }
}

/// A byte for each end signal from now on.
fn listen() -> io::Result<UnixStream> {
    let (receiver, sender) = UnixStream::pair()?;
    for signal in END_SIGNALS {
        pipe::register(signal, sender.try_clone()?)?;
    }
    Ok(receiver)
}

/// Returns when the limit is over, or a signal repeats an earlier one.
fn watch(mut signals: UnixStream, limit: Duration, by_signal: bool) -> Reason {
    let begun = Instant::now();
    let mut first = by_signal.then_some(begun);
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Reason::TimeUp;
        }
        let read = signals
            .set_read_timeout(Some(left))
            .and_then(|()| signals.read(&mut [0; 1]));
        match read {
            Ok(1..) => match first {
                None => first = Some(Instant::now()),
                Some(first) if first.elapsed() >= SAME_WISH => return Reason::AskedAgain,
                Some(_) => {}
            },
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // No more signals: the limit is left.
            Ok(0) | Err(_) => thread::sleep(left),
        }
    }
}

fn give_up(reason: Reason, limit: Duration) -> ! {
    terminal::restore();
    match reason {
        Reason::TimeUp => eprintln!(
            "diptych: Requests to the storage did not end within {} seconds; leaving them",
            limit.as_secs_f32()
        ),
        Reason::AskedAgain => {
            eprintln!("diptych: Ended at once, as asked again; last writes may be lost");
        }
    }
    process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Runs the watch beside `user`, who sends signals.
    fn watched(limit: Duration, by_signal: bool, user: impl FnOnce(UnixStream)) -> Reason {
        let (receiver, sender) = UnixStream::pair().unwrap();
        let watching = thread::spawn(move || watch(receiver, limit, by_signal));
        user(sender);
        watching.join().unwrap()
    }

    /// Signals until nobody listens.
    fn impatient(mut sender: UnixStream) {
        while sender.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn the_limit_ends_the_wait_with_and_without_signals_before_it() {
        let limit = Duration::from_millis(50);
        assert_eq!(watched(limit, false, drop), Reason::TimeUp);
        // All of them say the same as the first.
        assert_eq!(watched(limit, true, impatient), Reason::TimeUp);
        assert_eq!(watched(limit, false, impatient), Reason::TimeUp);
    }

    #[test]
    fn a_second_signal_ends_the_wait() {
        let for_ever = Duration::from_secs(3600);
        assert_eq!(watched(for_ever, true, impatient), Reason::AskedAgain);
        assert_eq!(watched(for_ever, false, impatient), Reason::AskedAgain);
    }
}
