//! Sees to it that a process that shall end ends: within a time limit, and at
//! once for a user who asks again. What the end consists of is the caller's.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::low_level::pipe;

use crate::signals::END_SIGNALS;
use crate::stdio::complain_at_the_end;
use crate::terminal;

/// Signals that come so soon after the first say the same: a terminal that is
/// closed sends SIGHUP twice, and that must not cost a flush.
const SAME_WISH: Duration = Duration::from_millis(500);
/// What the handlers of signals write.
const SIGNAL: u8 = b'X';
/// The end has begun for another reason.
const BEGUN: u8 = b'B';

/// Why the process ends here and now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    TimeUp,
    AskedAgain,
}

/// A thread that waits for the end of the process to begin: by one of the signals
/// that ask for it, which it hears itself, or by [`begin`](Self::begin). From then on
/// storage that hangs, a main thread that hangs, and whatever else hangs is left as a
/// crash would leave it after the limit, or when a signal comes although one has come
/// already: then the terminal is restored, a line says why, and the status is 1.
///
/// It watches until the process is gone, whether or not this is dropped.
pub(crate) struct EndWatchdog(Option<UnixStream>);

impl EndWatchdog {
    /// Starts to wait. To be called when the signals are listened for: each of them
    /// means the end from now on.
    ///
    /// Once per process. Without a thread for it nobody watches, which is logged.
    pub(crate) fn start(limit: Duration) -> Self {
        let watching = listen().and_then(|(events, sender)| {
            thread::Builder::new()
                .name("end-watchdog".to_owned())
                .spawn(move || give_up(watch(events, limit), limit))
                .map(|_| sender)
        });
        match watching {
            Ok(sender) => Self(Some(sender)),
            Err(error) => {
                tracing::error!(%error, "Nobody watches how long the end takes");
                Self(None)
            }
        }
    }

    /// The end has begun. `by_user`: as a signal would have said it, so that the next
    /// one repeats it.
    pub(crate) fn begin(&self, by_user: bool) {
        let event = if by_user { SIGNAL } else { BEGUN };
        if let Some(mut sender) = self.0.as_ref() {
            // Full of events: then it knows.
            let _ = sender.write(&[event]);
        }
    }
}

/// A byte for each end signal from now on, and who can send more.
fn listen() -> io::Result<(UnixStream, UnixStream)> {
    let (receiver, sender) = UnixStream::pair()?;
    for signal in END_SIGNALS {
        pipe::register(signal, sender.try_clone()?)?;
    }
    // The handlers' copies share it. They never wait in any case.
    sender.set_nonblocking(true)?;
    Ok((receiver, sender))
}

/// Returns when the limit is over since the end began, or a signal repeats an earlier
/// one.
fn watch(mut events: UnixStream, limit: Duration) -> Reason {
    let mut begun: Option<Instant> = None;
    let mut first: Option<Instant> = None;
    loop {
        let left = begun.map(|begun| limit.saturating_sub(begun.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            return Reason::TimeUp;
        }
        let mut event = [0; 1];
        let read = events
            .set_read_timeout(left)
            .and_then(|()| events.read(&mut event));
        match read {
            Ok(1..) => {
                let now = Instant::now();
                begun.get_or_insert(now);
                match first {
                    _ if event[0] != SIGNAL => {}
                    None => first = Some(now),
                    Some(first) if now - first >= SAME_WISH => return Reason::AskedAgain,
                    Some(_) => {}
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // No more events: the limit is left. The handlers hold the other end, so
            // this is not before the end has begun.
            Ok(0) | Err(_) => thread::sleep(left.unwrap_or(limit)),
        }
    }
}

fn give_up(reason: Reason, limit: Duration) -> ! {
    terminal::restore();
    complain_at_the_end(match reason {
        Reason::TimeUp => format!(
            "diptych: Requests to the storage did not end within {} seconds; leaving them",
            limit.as_secs_f32()
        ),
        Reason::AskedAgain => {
            "diptych: Ended at once, as asked again; last writes may be lost".to_owned()
        }
    });
    process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the watch beside `user`, who sends events.
    fn watched(limit: Duration, user: impl FnOnce(UnixStream)) -> Reason {
        let (receiver, sender) = UnixStream::pair().unwrap();
        let watching = thread::spawn(move || watch(receiver, limit));
        user(sender);
        watching.join().unwrap()
    }

    /// Sends `first`, then signals until nobody listens.
    fn impatient(first: u8) -> impl FnOnce(UnixStream) {
        move |mut sender| {
            let mut event = first;
            while sender.write_all(&[event]).is_ok() {
                event = SIGNAL;
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Sends one event, and says no more.
    fn once(event: u8) -> impl FnOnce(UnixStream) {
        move |mut sender| {
            sender.write_all(&[event]).unwrap();
            // Until nobody listens, which is never told.
            let _ = sender.read(&mut [0; 1]);
        }
    }

    #[test]
    fn the_limit_ends_the_wait_however_the_end_began() {
        let limit = Duration::from_millis(50);
        assert_eq!(watched(limit, once(BEGUN)), Reason::TimeUp);
        assert_eq!(watched(limit, once(SIGNAL)), Reason::TimeUp);
        // All of them say the same as the first.
        assert_eq!(watched(limit, impatient(SIGNAL)), Reason::TimeUp);
        assert_eq!(watched(limit, impatient(BEGUN)), Reason::TimeUp);
    }

    #[test]
    fn a_second_signal_ends_the_wait() {
        let for_ever = Duration::from_secs(3600);
        assert_eq!(watched(for_ever, impatient(SIGNAL)), Reason::AskedAgain);
        assert_eq!(watched(for_ever, impatient(BEGUN)), Reason::AskedAgain);
    }

    #[test]
    fn before_the_end_begins_no_time_is_counted() {
        let (receiver, mut sender) = UnixStream::pair().unwrap();
        let limit = Duration::from_millis(50);
        let watching = thread::spawn(move || {
            let begun = Instant::now();
            (watch(receiver, limit), begun.elapsed())
        });
        let pause = Duration::from_millis(200);
        thread::sleep(pause);
        sender.write_all(&[BEGUN]).unwrap();
        let (reason, waited) = watching.join().unwrap();
        assert_eq!(reason, Reason::TimeUp);
        assert!(waited >= pause);
    }
}
