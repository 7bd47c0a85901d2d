//! The options of each driver on the wire, read in the order of QEMU's schema.

use std::path::PathBuf;

use block::{DriverOptions, FileOptions, NullCoOptions, RawOptions};

use super::{Common, child};
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;

/// What QEMU may do I/O with. All I/O here goes through io_uring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aio {
    Threads,
    Native,
    IoUring,
}

pub(super) fn file(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    file_or_device(args, common, false)
}

pub(super) fn host_device(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    file_or_device(args, common, true)
}

fn file_or_device(
    args: &mut Args,
    common: &Common,
    host_device: bool,
) -> Result<DriverOptions, QmpError> {
    let filename = args.required_str("filename")?;
    let locking = args
        .optional_enum(
            "locking",
            &[("auto", None), ("on", Some(true)), ("off", Some(false))],
        )?
        .flatten();
    let aio = args.optional_enum(
        "aio",
        &[
            ("threads", Aio::Threads),
            ("native", Aio::Native),
            ("io_uring", Aio::IoUring),
        ],
    )?;
    if aio == Some(Aio::Native) && !common.direct {
        return Err(QmpError::generic(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    if filename.is_empty() {
        let driver = if host_device { "host_device" } else { "file" };
        return Err(QmpError::generic(format!(
            "The '{driver}' block driver requires a file name"
        )));
    }
    Ok(DriverOptions::File(FileOptions {
        filename: PathBuf::from(filename),
        locking,
        host_device,
    }))
}

pub(super) fn null_co(args: &mut Args, _: &Common) -> Result<DriverOptions, QmpError> {
    const DEFAULT_SIZE: u64 = 1 << 30;
    let size = args.optional_non_negative("size")?;
    let latency_ns = args.optional_u64("latency-ns")?.unwrap_or(0);
    let read_zeroes = args.optional_bool("read-zeroes")?.unwrap_or(false);
    if i64::try_from(latency_ns).is_err() {
        return Err(QmpError::generic("latency-ns is invalid"));
    }
    Ok(DriverOptions::NullCo(NullCoOptions {
        size: size.unwrap_or(DEFAULT_SIZE),
        latency_ns,
        read_zeroes,
    }))
}

pub(super) fn raw(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", &common.for_file())?;
    let offset = args.optional_non_negative("offset")?.unwrap_or(0);
    let size = args.optional_non_negative("size")?;
    Ok(DriverOptions::Raw(RawOptions { file, offset, size }))
}
