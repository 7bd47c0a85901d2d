//! Errors and panics of `imago`.

use std::any::Any;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;

use super::Qcow2Driver;
use crate::error::{IoError, IoOp};

impl Qcow2Driver {
    pub(super) fn error(&self, op: IoOp, offset: u64, len: u64, errno: i32) -> IoError {
        IoError {
            op,
            node: Arc::clone(&self.node),
            offset,
            len,
            errno,
        }
    }

    /// Runs a part of `imago` for the request given. A panic there, by an image
    /// that nobody thought of, makes this node fail for ever and harms nothing else.
    pub(super) async fn run<T>(
        &self,
        (op, offset, len): (IoOp, u64, u64),
        part: impl Future<Output = io::Result<T>>,
    ) -> Result<T, IoError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(self.error(op, offset, len, libc::EIO));
        }
        match AssertUnwindSafe(part).catch_unwind().await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.error(op, offset, len, errno_of(&self.node, &error))),
            Err(panic) => {
                self.broken.store(true, Ordering::Release);
                tracing::error!(
                    node = &*self.node,
                    "The image cannot be used any more, its tables make no sense: {}",
                    panic_text(&*panic)
                );
                Err(self.error(op, offset, len, libc::EIO))
            }
        }
    }
}

/// The errno that an error of `imago` stands for.
fn errno_of(node: &str, error: &io::Error) -> i32 {
    if let Some(errno) = error.raw_os_error() {
        return errno;
    }
    match error.kind() {
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => {
            tracing::warn!(node, %error, "error in an image");
            libc::EIO
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "unknown panic",
    }
}
