//! Reopening an image, and giving it another backing image.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::{Image, Qcow2Driver, open_image, read_header};
use crate::driver::{ChildRole, Reopen, Reopened};
use crate::drivers::ReopenError;
use crate::options::DriverOptions;

/// What a reopen makes of an image.
pub(super) struct Next {
    pub(super) read_only: bool,
    /// Opened for writing, where the present one was not.
    pub(super) image: Option<Image>,
}

impl Qcow2Driver {
    pub(super) fn next(&self) -> MutexGuard<'_, Option<Next>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares for a reopen. An image that was opened for writing stays open so; one
    /// that was not is opened once more, since nobody can have changed it.
    pub(super) async fn prepare(&self, to: &Reopen<'_>) -> Result<Reopened, ReopenError> {
        let changed = |option: &str| ReopenError::CannotChange(option.to_owned());
        for (role, file) in [
            (ChildRole::File, Some(&self.file)),
            (ChildRole::DataFile, self.data_file.as_ref()),
        ] {
            let now = file.map(|file| file.node().skip_filters().id());
            let then = to.child(role).map(|node| node.skip_filters().id());
            // Its tables are known, and would not be those of another file.
            if now != then {
                return Err(changed(role.as_str()));
            }
        }
        if let (DriverOptions::Qcow2(old), DriverOptions::Qcow2(new)) = (to.old, to.driver)
            && old.pass_discard_request != new.pass_discard_request
        {
            return Err(changed("pass-discard-request"));
        }
        let read_only = to.options.read_only;
        let mut image = None;
        if !read_only && !self.writable.load(Ordering::Relaxed) {
            let header = read_header(&self.file.node(), false).await?;
            let backing = self.backing.load_full();
            let nodes = (&self.file, self.data_file.as_ref(), backing.as_deref());
            image = Some(open_image(&header, nodes, true, &self.broken).await?);
        }
        *self.next() = Some(Next { read_only, image });
        Ok(Reopened {
            read_only,
            size: None,
        })
    }

    /// The image, when nobody can have it: no request is in flight.
    pub(super) fn change_image(&self, change: impl FnOnce(&mut Image)) {
        match self.image.try_write() {
            Ok(mut image) => change(&mut image),
            Err(_) => {
                self.broken.store(true, Ordering::Release);
                tracing::error!(
                    node = &*self.node,
                    "The image cannot be used any more: it was changed with requests in flight"
                );
            }
        }
    }
}
