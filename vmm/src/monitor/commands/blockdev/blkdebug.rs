//! The options of `blkdebug` on the wire: limits, rules, rights.

use std::path::PathBuf;
use std::time::Duration;

use block::drivers::blkdebug::{IO_TYPES, InjectError, SetState};
use block::{BlkdebugOptions, DebugEvent, DriverOptions, Perm};

use super::{Common, child};
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;

/// Options that make a node another one than others over the same image.
pub(super) const TELLING: &[&str] = &[
    "config",
    "align",
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
];

/// Lists of rules, which all do.
pub(super) const RULES: &[&str] = &["inject-error", "set-state"];

const PERMISSIONS: &[(&str, Perm)] = &[
    ("consistent-read", Perm::CONSISTENT_READ),
    ("write", Perm::WRITE),
    ("write-unchanged", Perm::WRITE_UNCHANGED),
    ("resize", Perm::RESIZE),
];

pub(super) fn options(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let image = child(args, "image", common)?;
    let config = args.optional_str("config")?.map(PathBuf::from);
    let align = args.optional_non_negative("align")?.unwrap_or(0);
    let mut limit = |name| Ok::<_, QmpError>(args.optional_non_negative_i32(name)?.unwrap_or(0));
    let max_transfer = limit("max-transfer")?;
    let opt_write_zero = limit("opt-write-zero")?;
    let max_write_zero = limit("max-write-zero")?;
    let opt_discard = limit("opt-discard")?;
    let max_discard = limit("max-discard")?;
    let inject_error = rules(args, "inject-error", inject_error)?;
    let set_state = rules(args, "set-state", set_state)?;
    let take_child_perms = permissions(args, "take-child-perms")?;
    let unshare_child_perms = permissions(args, "unshare-child-perms")?;
    Ok(DriverOptions::Blkdebug(BlkdebugOptions {
        image,
        config,
        align,
        max_transfer,
        opt_write_zero,
        max_write_zero,
        opt_discard,
        max_discard,
        inject_error,
        set_state,
        take_child_perms,
        unshare_child_perms,
    }))
}

/// QEMU loses empty lists on the way to the driver, which does not know what is
/// left of them.
fn refuse_empty<T>(args: &Args, name: &str, list: &[T]) {
    if list.is_empty() {
        args.refuse(QmpError::generic(format!(
            "Block protocol 'blkdebug' doesn't support the option '{name}'"
        )));
    }
}

fn rules<T>(
    args: &mut Args,
    name: &str,
    read: fn(&mut Args) -> Result<T, QmpError>,
) -> Result<Vec<T>, QmpError> {
    let Some(list) = args.optional_list(name)? else {
        return Ok(Vec::new());
    };
    refuse_empty(args, name, &list);
    list.into_iter()
        .map(|mut args| {
            let rule = read(&mut args)?;
            args.finish()?;
            Ok(rule)
        })
        .collect()
}

fn permissions(args: &mut Args, name: &str) -> Result<Perm, QmpError> {
    let Some(list) = args.optional_enum_list(name, PERMISSIONS)? else {
        return Ok(Perm::NONE);
    };
    refuse_empty(args, name, &list);
    Ok(list.into_iter().fold(Perm::NONE, |all, perm| all | perm))
}

fn event(args: &mut Args) -> Result<DebugEvent, QmpError> {
    let name = args.required_str("event")?;
    DebugEvent::from_name(&name).ok_or_else(|| QmpError::bad_value("event", &name))
}

/// States and errnos are the lower half of what is given, as in QEMU.
fn int(args: &mut Args, name: &str) -> Result<Option<i32>, QmpError> {
    Ok(args.optional_i64(name)?.map(|value| value as i32))
}

fn inject_error(args: &mut Args) -> Result<InjectError, QmpError> {
    Ok(InjectError {
        event: event(args)?,
        state: int(args, "state")?.unwrap_or(0),
        op: args.optional_enum("iotype", IO_TYPES)?,
        errno: int(args, "errno")?.unwrap_or(libc::EIO),
        sector: args
            .optional_i64("sector")?
            .and_then(InjectError::sector_from),
        once: args.optional_bool("once")?.unwrap_or(false),
        immediately: args.optional_bool("immediately")?.unwrap_or(false),
        delay: Duration::from_nanos(args.optional_u64("delay-ns")?.unwrap_or(0)),
    })
}

fn set_state(args: &mut Args) -> Result<SetState, QmpError> {
    let event = event(args)?;
    let state = int(args, "state")?.unwrap_or(0);
    let new_state = args.required_i64("new_state")? as i32;
    Ok(SetState {
        event,
        state,
        new_state,
    })
}
