//! Signals that end the client, seen during each of its waits.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::flag;
use signal_hook::low_level::pipe;

use crate::client::Watch;
use crate::signals::END_SIGNALS;

/// Counts the signals; more than are tolerated end every wait.
///
/// None of them kills the process any more while it is registered, which is for
/// the rest of its life.
#[derive(Debug)]
pub struct Interrupts {
    /// A byte for each signal.
    bytes: UnixStream,
    /// Number of the last one. Own synchronisation: stored by the handler
    /// before it writes its byte.
    last: Arc<AtomicUsize>,
    seen: usize,
    tolerated: usize,
}

impl Interrupts {
    /// Begins to count.
    pub fn new() -> io::Result<Self> {
        let (bytes, sender) = UnixStream::pair()?;
        bytes.set_nonblocking(true)?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in END_SIGNALS {
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, Arc::clone(&last), number)?;
            pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Self {
            bytes,
            last,
            seen: 0,
            tolerated: 0,
        })
    }

    /// Lets one more signal pass for now: for what is short and better done wholly.
    /// It counts at the next [`heed`](Self::heed).
    pub fn defer(&mut self) {
        self.look();
        self.tolerated = self.seen.saturating_add(1);
    }

    /// From now on each signal counts, also those that were deferred.
    pub fn heed(&mut self) {
        self.tolerated = 0;
    }

    /// What came until now is dealt with: the next signal counts.
    pub fn acknowledge(&mut self) {
        self.look();
        self.tolerated = self.seen;
    }

    /// Where the number of the last signal is, for as long as the process lives.
    pub fn last(&self) -> LastSignal {
        LastSignal(Arc::clone(&self.last))
    }

    fn look(&mut self) {
        let mut bytes = [0; 64];
        // None is the common case, and shown as an error.
        while let Ok(count @ 1..) = self.bytes.read(&mut bytes) {
            self.seen = self.seen.saturating_add(count);
        }
    }
}

/// See [`Interrupts::last`].
#[derive(Clone, Debug)]
pub struct LastSignal(Arc<AtomicUsize>);

impl LastSignal {
    /// Its number, 0 if there was none.
    pub fn number(&self) -> u8 {
        u8::try_from(self.0.load(Ordering::SeqCst)).unwrap_or_default()
    }
}

impl Watch for Interrupts {
    fn check(&mut self) -> Result<(), String> {
        self.look();
        if self.seen > self.tolerated {
            return Err("Interrupted".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn one_signal_passes_however_many_came_before() {
        let (bytes, mut sender) = UnixStream::pair().unwrap();
        bytes.set_nonblocking(true).unwrap();
        let mut interrupts = Interrupts {
            bytes,
            last: Arc::default(),
            seen: 0,
            tolerated: 0,
        };
        for _ in 0..2 {
            sender.write_all(&[0; 3]).unwrap();
            assert!(interrupts.check().is_err());
            interrupts.acknowledge();
            interrupts.defer();
            sender.write_all(&[0]).unwrap();
            assert!(interrupts.check().is_ok());
            sender.write_all(&[0]).unwrap();
            assert!(interrupts.check().is_err());
        }
        interrupts.defer();
        assert!(interrupts.check().is_ok());
        interrupts.heed();
        assert!(interrupts.check().is_err());
    }
}
