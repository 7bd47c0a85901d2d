//! Reopening an image, and giving it another backing image.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::header::check_options;
use super::{Image, Qcow2Driver, open_image, read_header};
use crate::driver::{ChildRole, Reopen, Reopened};
use crate::drivers::ReopenError;
use crate::options::{BackingRef, DiscardMode, DriverOptions};

/// What a reopen makes of an image.
pub(super) struct Next {
    pub(super) read_only: bool,
    pub(super) pass_discard: bool,
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
        let mut pass_discard = to.options.discard == DiscardMode::Unmap;
        if let DriverOptions::Qcow2(new) = to.driver {
            check_options(new, self.version, self.cluster_size)?;
            pass_discard = new.pass_discard_request.unwrap_or(pass_discard);
            let says_nothing = new.backing == BackingRef::Header;
            if says_nothing && self.names_backing && to.child(ChildRole::Backing).is_none() {
                return Err(ReopenError::BackingMissing(to.node.to_owned()));
            }
        }
        let read_only = to.options.read_only;
        let mut image = None;
        if !read_only && !self.writable.load(Ordering::Relaxed) {
            let header = read_header(&self.file.node(), false, None).await?;
            let backing = self.backing.load_full();
            let nodes = (&self.file, self.data_file.as_ref(), backing.as_deref());
            image = Some(open_image(&header, nodes, true, &self.broken).await?);
        }
        *self.next() = Some(Next {
            read_only,
            pass_discard,
            image,
        });
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
