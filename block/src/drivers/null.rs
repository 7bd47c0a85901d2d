//! `null-co` and `null-aio`: a disk without storage, for tests and measurements.

use std::time::Duration;

use crate::buffer::IoVec;
use crate::driver::{
    BlockDriver, BoxFuture, Extent, ExtentFlags, Limits, Reopen, Reopened, WriteFlags, ZeroFlags,
};
use crate::drivers::ReopenError;
use crate::error::IoError;
use crate::options::{DriverOptions, NullCoOptions};
use crate::runtime;

/// Forgets writes; reads give zeroes, or leave the buffer as it is.
#[derive(Debug)]
pub struct NullDriver {
    options: NullCoOptions,
}

impl NullDriver {
    /// A null disk as `options` say.
    pub fn new(options: NullCoOptions) -> Self {
        Self { options }
    }

    async fn done(&self) -> Result<(), IoError> {
        if self.options.latency_ns > 0 {
            runtime::sleep(Duration::from_nanos(self.options.latency_ns)).await;
        }
        Ok(())
    }
}

impl BlockDriver for NullDriver {
    fn name(&self) -> &'static str {
        if self.options.aio {
            "null-aio"
        } else {
            "null-co"
        }
    }

    fn size(&self) -> u64 {
        self.options.size
    }

    fn limits(&self) -> Limits {
        Limits {
            can_zero_fast: true,
            ..Limits::default()
        }
    }

    fn filename(&self) -> String {
        format!("{}://", self.name())
    }

    fn read<'a>(&'a self, _offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            if self.options.read_zeroes {
                iov.fill(0);
            }
            self.done().await
        })
    }

    fn write<'a>(
        &'a self,
        _offset: u64,
        _iov: IoVec,
        _flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.done())
    }

    fn write_zeroes<'a>(
        &'a self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.done())
    }

    fn discard<'a>(&'a self, _offset: u64, _len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.done())
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.done())
    }

    fn allocated_size(&self) -> BoxFuture<'_, Option<u64>> {
        Box::pin(async { Some(0) })
    }

    /// Nothing of its own can be changed.
    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            let DriverOptions::NullCo(new) = to.driver else {
                return Err(ReopenError::CannotChange("driver".to_owned()));
            };
            let (old, default) = (&self.options, NullCoOptions::default());
            let options = [
                (
                    "read-zeroes",
                    new.read_zeroes == old.read_zeroes,
                    new.read_zeroes == default.read_zeroes,
                ),
                ("size", new.size == old.size, new.size == default.size),
                (
                    "latency-ns",
                    new.latency_ns == old.latency_ns,
                    new.latency_ns == default.latency_ns,
                ),
            ];
            let mut changed = options.iter().filter(|(_, same, _)| !same);
            if let Some((name, ..)) = changed.clone().find(|(.., is_default)| *is_default) {
                return Err(ReopenError::CannotReset((*name).to_owned()));
            }
            match changed.next() {
                Some((name, ..)) => Err(ReopenError::CannotChange((*name).to_owned())),
                None => Ok(Reopened {
                    read_only: to.options.read_only,
                    size: None,
                }),
            }
        })
    }

    fn block_status<'a>(
        &'a self,
        _offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<Extent, IoError>> {
        let zero = self.options.read_zeroes;
        Box::pin(async move {
            Ok(Extent {
                len,
                flags: ExtentFlags {
                    data: !zero,
                    zero,
                    allocated: true,
                },
            })
        })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::runtime::EventLoop;

    #[test]
    fn reads_give_zeroes_only_if_asked_to_and_take_their_time() {
        let event_loop = EventLoop::new("test").unwrap();
        for read_zeroes in [false, true] {
            let driver = NullDriver::new(NullCoOptions {
                aio: false,
                size: 4096,
                latency_ns: 2_000_000,
                read_zeroes,
            });
            let iov = AlignedBuffer::new(512).io_vec(512);
            iov.fill(7);
            let start = Instant::now();
            event_loop.block_on(driver.read(0, iov.clone())).unwrap();
            assert!(start.elapsed() >= Duration::from_millis(2));
            assert_eq!(iov.is_zero(), read_zeroes);
            let extent = event_loop.block_on(driver.block_status(0, 4096)).unwrap();
            assert_eq!((extent.len, extent.flags.zero), (4096, read_zeroes));
        }
    }
}
