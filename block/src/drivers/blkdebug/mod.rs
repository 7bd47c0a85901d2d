//! `blkdebug`: lets chosen requests fail or wait, and shows other limits than the
//! node below has. For tests.
//!
//! - `rules`: which requests, and when;
//! - `config`: files of rules;
//! - here: the filter.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::buffer::{AlignedBuffer, IoVec};
use crate::debug_event::DebugEvent;
use crate::driver::{
    BlockDriver, BoxFuture, ChildRole, Extent, Limits, Reopen, Reopened, WriteFlags, ZeroFlags,
};
use crate::drivers::ReopenError;
use crate::error::{IoError, IoOp, os_text};
use crate::node::{Child, Node, SECTOR_SIZE};
use crate::options::{BlkdebugOptions, DriverOptions};
use crate::permissions::{Perm, Permissions};
use crate::runtime::{self, unblock};
use crate::sync::{Mutex, MutexGuard, lock};

mod config;
mod rules;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub use rules::{InjectError, SetState};

use config::ConfigRules;
use rules::{Hit, Rules};

/// QEMU's names of the kinds of requests.
pub const IO_TYPES: &[(&str, IoOp)] = &[
    ("read", IoOp::Read),
    ("write", IoOp::Write),
    ("write-zeroes", IoOp::WriteZeroes),
    ("discard", IoOp::Discard),
    ("flush", IoOp::Flush),
    ("block-status", IoOp::BlockStatus),
];

/// Zeroes that the alignment keeps from going out as such are written as data in
/// pieces of this many bytes.
const ZERO_PIECE: usize = 64 << 10;

/// Why a `blkdebug` node cannot be opened. The texts are QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum BlkdebugError {
    /// Limits that contradict each other, or the node below.
    #[error("Cannot meet constraints with {name} {value}")]
    Constraint {
        /// The option.
        name: &'static str,
        /// What was given.
        value: u64,
    },
    /// The file of rules cannot be opened.
    #[error("Could not read blkdebug config file: {}", os_text(.0))]
    OpenConfig(io::Error),
    /// The file of rules cannot be read.
    #[error("Cannot read config file: {}", os_text(.0))]
    ReadConfig(io::Error),
    /// A line that is neither a group nor `key = "value"`.
    #[error("parse error")]
    Parse,
    /// A value before the first group.
    #[error("no group defined")]
    NoGroup,
    /// A group of another name.
    #[error("There is no option group '{0}'")]
    NoSuchGroup(String),
    /// A rule without an event.
    #[error("Missing event name for rule")]
    NoEvent,
    /// An event or a kind of requests that there is not.
    #[error("invalid parameter value: {0}")]
    BadValue(String),
    /// A key that rules do not have.
    #[error("Invalid parameter '{0}'")]
    UnknownKey(String),
    /// No number.
    #[error("Parameter '{0}' expects a number")]
    NotANumber(&'static str),
    /// Neither on nor off.
    #[error("Parameter '{0}' expects 'on' or 'off'")]
    NotAFlag(&'static str),
}

/// See the module.
#[derive(Debug)]
pub struct BlkdebugDriver {
    image: Child,
    limits: Limits,
    /// Unit of zero writes, and of discards, in bytes: powers of two. What is left over
    /// of zero writes is written as data.
    zero_unit: u64,
    discard_unit: u64,
    /// Largest write of zeroes, and discard, in bytes; of whole sectors.
    max_write_zero: u64,
    max_discard: u64,
    take: Perm,
    unshare: Perm,
    /// A leaf lock, held to find the rule of a request.
    rules: Mutex<Rules>,
}

impl BlkdebugDriver {
    /// A filter on `image`, as `options` say (whose own `image` has been looked up
    /// by the caller).
    ///
    /// The file of rules is read on a helper thread. Cancel: nothing remains.
    pub async fn open(options: &BlkdebugOptions, image: Child) -> Result<Self, BlkdebugError> {
        let mut rules = match &options.config {
            Some(path) => read_config(path.clone()).await?,
            None => ConfigRules::default(),
        };
        rules.errors.extend_from_slice(&options.inject_error);
        rules.states.extend_from_slice(&options.set_state);
        let below = image.node().limits();
        let align = check_limits(options, below)?;
        // Requests are of whole sectors, whatever is asked for.
        let most = |value: u32| match u64::from(value) / SECTOR_SIZE * SECTOR_SIZE {
            0 if value > 0 => SECTOR_SIZE,
            0 => u64::MAX,
            most => most,
        };
        let unit = |value: u32, below: u32| match value {
            0 => below,
            value => value.max(SECTOR_SIZE as u32).next_power_of_two(),
        };
        Ok(Self {
            image,
            limits: Limits {
                request_alignment: align,
                zero_alignment: unit(options.opt_write_zero, below.zero_alignment),
                max_transfer: match options.max_transfer {
                    0 => below.max_transfer,
                    max => max.max(SECTOR_SIZE as u32),
                },
                ..below
            },
            // The one of the node below is not passed on.
            zero_unit: unit(options.opt_write_zero, 1).max(align).into(),
            max_write_zero: most(options.max_write_zero),
            max_discard: most(options.max_discard),
            discard_unit: unit(options.opt_discard, 1).into(),
            take: options.take_child_perms,
            unshare: options.unshare_child_perms,
            rules: Mutex::new(Rules::new(rules.errors, rules.states)),
        })
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        lock(&self.rules)
    }

    /// Waits or fails as the rules say.
    async fn check(&self, op: IoOp, offset: u64, len: u64) -> Result<(), IoError> {
        // Requests count in whole units.
        let unit = u64::from(self.limits.request_alignment);
        let start = offset - offset % unit;
        let end = offset.saturating_add(len);
        let end = end.checked_next_multiple_of(unit).unwrap_or(end);
        let len_in_units = if len == 0 { 0 } else { end - start };
        let hit = self.rules().hit(op, start, len_in_units);
        let Some(Hit {
            errno,
            immediately,
            delay,
        }) = hit
        else {
            return Ok(());
        };
        if !delay.is_zero() {
            runtime::sleep(delay).await;
        }
        let Some(errno) = errno else { return Ok(()) };
        if !immediately {
            runtime::yield_now().await;
        }
        Err(self.image.node().error(op, offset, len, errno))
    }

    /// Writes zeroes as data, as pieces that the alignment leaves over are.
    async fn write_zero_data(&self, offset: u64, len: u64, fua: bool) -> Result<(), IoError> {
        if len == 0 {
            return Ok(());
        }
        let zeroes = AlignedBuffer::new(ZERO_PIECE);
        let flags = WriteFlags {
            fua,
            unchanged: false,
        };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZERO_PIECE as u64);
            let iov = zeroes.io_vec(piece as usize);
            self.check(IoOp::Write, offset + done, piece).await?;
            self.image.node().write(offset + done, iov, flags).await?;
            done += piece;
        }
        Ok(())
    }
}

async fn read_config(path: PathBuf) -> Result<ConfigRules, BlkdebugError> {
    unblock(move || config::read(Path::new(&path))).await
}

/// Checks the limits against each other, and gives the alignment.
fn check_limits(options: &BlkdebugOptions, below: Limits) -> Result<u32, BlkdebugError> {
    const TOO_MUCH: u64 = i32::MAX as u64;
    let wrong = |name, value| BlkdebugError::Constraint { name, value };
    if options.align > 0 && (options.align >= TOO_MUCH || !options.align.is_power_of_two()) {
        return Err(wrong("align", options.align));
    }
    let own = u32::try_from(options.align).map_err(|_| wrong("align", options.align))?;
    // What is given has to go with this. To QEMU nodes that take any sector take any
    // byte; sizes below a sector are never asked for.
    let align = own.max(match own {
        1.. if below.request_alignment > SECTOR_SIZE as u32 => below.request_alignment,
        _ => 1,
    });
    let multiples = [
        ("max-transfer", options.max_transfer, align),
        ("opt-write-zero", options.opt_write_zero, align),
        (
            "max-write-zero",
            options.max_write_zero,
            align.max(options.opt_write_zero),
        ),
        ("opt-discard", options.opt_discard, align),
        (
            "max-discard",
            options.max_discard,
            align.max(options.opt_discard),
        ),
    ];
    for (name, value, unit) in multiples {
        let value_64 = u64::from(value);
        if value > 0 && (value_64 >= TOO_MUCH || !value.is_multiple_of(unit)) {
            return Err(wrong(name, value_64));
        }
    }
    Ok(own.max(below.request_alignment).max(SECTOR_SIZE as u32))
}

/// An option that is not the same in both.
fn changed(new: &BlkdebugOptions, old: &BlkdebugOptions) -> Option<&'static str> {
    let options = [
        ("config", new.config == old.config),
        ("align", new.align == old.align),
        ("max-transfer", new.max_transfer == old.max_transfer),
        ("opt-write-zero", new.opt_write_zero == old.opt_write_zero),
        ("max-write-zero", new.max_write_zero == old.max_write_zero),
        ("opt-discard", new.opt_discard == old.opt_discard),
        ("max-discard", new.max_discard == old.max_discard),
        ("inject-error", new.inject_error == old.inject_error),
        ("set-state", new.set_state == old.set_state),
        (
            "take-child-perms",
            new.take_child_perms == old.take_child_perms,
        ),
        (
            "unshare-child-perms",
            new.unshare_child_perms == old.unshare_child_perms,
        ),
    ];
    let mut changed = options.iter().filter(|(_, same)| !same);
    changed.next().map(|(name, _)| *name)
}

/// The part of a range that consists of whole units: its start and end.
fn whole_units(offset: u64, len: u64, unit: u64) -> (u64, u64) {
    let end = offset.saturating_add(len);
    let last = end - end % unit;
    let first = offset.checked_next_multiple_of(unit).unwrap_or(last);
    (first.min(end), last.max(first.min(end)))
}

impl BlockDriver for BlkdebugDriver {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn size(&self) -> u64 {
        self.image.node().size()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn filename(&self) -> String {
        self.image.node().driver().filename()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.check(IoOp::Read, offset, iov.len() as u64).await?;
            self.image.node().read(offset, iov).await
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.check(IoOp::Write, offset, iov.len() as u64).await?;
            self.image.node().write(offset, iov, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let (first, last) = whole_units(offset, len, self.zero_unit);
            let end = offset + len;
            let (head, tail) = (first - offset, end - last);
            if flags.no_fallback && (head > 0 || tail > 0) {
                return Err(self.image.node().error(
                    IoOp::WriteZeroes,
                    offset,
                    len,
                    libc::EOPNOTSUPP,
                ));
            }
            self.write_zero_data(offset, head, flags.fua).await?;
            let mut at = first;
            while at < last {
                let piece = (last - at).min(self.max_write_zero);
                self.check(IoOp::WriteZeroes, at, piece).await?;
                self.image.node().write_zeroes(at, piece, flags).await?;
                at += piece;
            }
            self.write_zero_data(last, tail, flags.fua).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            // What is left over of the units stays: a discard is a hint.
            let (mut at, last) = whole_units(offset, len, self.discard_unit);
            while at < last {
                let piece = (last - at).min(self.max_discard);
                self.check(IoOp::Discard, at, piece).await?;
                self.image.node().discard(at, piece).await?;
                at += piece;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.check(IoOp::Flush, 0, 0).await?;
            let image = self.image.node();
            image.flush_events();
            image.flush().await
        })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            self.check(IoOp::BlockStatus, offset, len).await?;
            self.image.node().block_status(offset, len).await
        })
    }

    /// Rules and limits stay as they are; the image may be another one.
    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            if let (DriverOptions::Blkdebug(new), DriverOptions::Blkdebug(old)) =
                (to.driver, to.old)
                && let Some(name) = changed(new, old)
            {
                return Err(ReopenError::CannotChange(name.to_owned()));
            }
            Ok(to.filter(ChildRole::Image, &self.image.node()))
        })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.image.node())
    }

    fn debug_event(&self, event: DebugEvent) {
        self.rules().happened(event);
    }

    fn child_permissions(&self, _role: ChildRole, users: Permissions) -> Permissions {
        Permissions {
            need: users.need | self.take,
            share: users.share.without(self.unshare),
        }
    }
}
