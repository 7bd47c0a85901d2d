//! The options of each driver on the wire, read in the order of QEMU's schema.

use std::path::PathBuf;
use std::time::Duration;

use block::{
    CbwPolicy, CopyBeforeWriteOptions, CopyOnReadOptions, DriverOptions, EncryptOptions,
    FileOptions, InetAddress, NbdOptions, NullCoOptions, OnCbwError, PreallocateOptions,
    Qcow2Options, RawOptions, SnapshotAccessOptions, SocketAddress, ThrottleOptions,
};

use super::{Common, backing, child, optional_child};
use crate::monitor::args::{Args, StringOrObject};
use crate::monitor::error::QmpError;

/// `on-cbw-error`
pub(in crate::monitor::commands) const ON_CBW_ERROR: &[(&str, OnCbwError)] = &[
    ("break-guest-write", OnCbwError::BreakGuestWrite),
    ("break-snapshot", OnCbwError::BreakSnapshot),
];

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
    let pr_manager = args.optional_str("pr-manager")?;
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
    // How QEMU works, not what it does.
    args.optional_i64("aio-max-batch")?;
    args.optional_bool("drop-cache")?;
    args.optional_bool("x-check-cache-dropped")?;
    // Ours: QEMU keeps bitmaps in qcow2 images only.
    let bitmap_file = args.optional_str("bitmap-file")?;
    if aio == Some(Aio::Native) && !common.direct {
        args.refuse(QmpError::generic(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    if filename.is_empty() {
        let driver = if host_device { "host_device" } else { "file" };
        args.refuse(QmpError::generic(format!(
            "The '{driver}' block driver requires a file name"
        )));
    }
    if let Some(id) = pr_manager {
        args.refuse(QmpError::generic(format!(
            "No persistent reservation manager with id '{id}'"
        )));
    }
    Ok(DriverOptions::File(FileOptions {
        filename: PathBuf::from(filename),
        locking,
        host_device,
        bitmap_file: bitmap_file
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
    }))
}

pub(super) fn nbd(args: &mut Args, _: &Common) -> Result<DriverOptions, QmpError> {
    let server = nbd_server(args.required_object("server")?)?;
    let export = args.optional_str("export")?.unwrap_or_default();
    let tls_creds = args.optional_str("tls-creds")?;
    // Without credentials there is no TLS, and no name to be checked.
    let _ = args.optional_str("tls-hostname")?;
    let dirty_bitmap = args.optional_str("x-dirty-bitmap")?;
    let seconds = |value: Option<u32>| Duration::from_secs(value.unwrap_or(0).into());
    let reconnect_delay = seconds(args.optional_u32("reconnect-delay")?);
    let open_timeout = seconds(args.optional_u32("open-timeout")?);
    if let Some(id) = tls_creds {
        args.refuse(QmpError::generic(format!(
            "No TLS credentials with id '{id}'"
        )));
    }
    Ok(DriverOptions::Nbd(NbdOptions {
        server,
        export,
        dirty_bitmap,
        reconnect_delay,
        open_timeout,
    }))
}

fn nbd_server(mut args: Args) -> Result<SocketAddress, QmpError> {
    #[derive(Clone, Copy)]
    enum Type {
        Inet,
        Unix,
        Vsock,
        Fd,
    }
    let kind = args.required_enum(
        "type",
        &[
            ("inet", Type::Inet),
            ("unix", Type::Unix),
            ("vsock", Type::Vsock),
            ("fd", Type::Fd),
        ],
    )?;
    let address = match kind {
        Type::Inet => SocketAddress::Inet(inet_address(&mut args)?),
        Type::Unix => SocketAddress::Unix {
            path: PathBuf::from(args.required_str("path")?),
            is_abstract: args.optional_bool("abstract")?.unwrap_or(false),
            tight: args.optional_bool("tight")?.unwrap_or(true),
        },
        Type::Vsock => {
            return Err(QmpError::generic(
                "Socket address type 'vsock' is not supported here; use 'inet' or 'unix'",
            ));
        }
        Type::Fd => {
            args.required_str("str")?;
            args.finish()?;
            // What QEMU's storage daemon says, too.
            return Err(QmpError::generic(
                "only QEMU supports file descriptor passing",
            ));
        }
    };
    args.finish()?;
    Ok(address)
}

fn inet_address(args: &mut Args) -> Result<InetAddress, QmpError> {
    let host = args.required_str("host")?;
    let port = args.required_str("port")?;
    // A number is tried as such anyway, and a range is for servers.
    args.optional_bool("numeric")?;
    args.optional_u32("to")?;
    let ipv4 = args.optional_bool("ipv4")?;
    let ipv6 = args.optional_bool("ipv6")?;
    let keep_alive = args.optional_bool("keep-alive")?.unwrap_or(false);
    if ipv4 == Some(false) && ipv6 == Some(false) {
        args.refuse(QmpError::generic(
            "Cannot disable IPv4 and IPv6 at same time",
        ));
    }
    Ok(InetAddress {
        host,
        port,
        ipv4,
        ipv6,
        keep_alive,
    })
}

pub(super) fn null_co(args: &mut Args, _: &Common) -> Result<DriverOptions, QmpError> {
    null(args, false)
}

pub(super) fn null_aio(args: &mut Args, _: &Common) -> Result<DriverOptions, QmpError> {
    null(args, true)
}

fn null(args: &mut Args, aio: bool) -> Result<DriverOptions, QmpError> {
    const DEFAULT_SIZE: u64 = 1 << 30;
    let size = args.optional_non_negative("size")?;
    let latency_ns = args.optional_u64("latency-ns")?.unwrap_or(0);
    let read_zeroes = args.optional_bool("read-zeroes")?.unwrap_or(false);
    if i64::try_from(latency_ns).is_err() {
        args.refuse(QmpError::generic("latency-ns is invalid"));
    }
    Ok(DriverOptions::NullCo(NullCoOptions {
        aio,
        size: size.unwrap_or(DEFAULT_SIZE),
        latency_ns,
        read_zeroes,
    }))
}

pub(super) fn raw(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", common)?;
    let offset = args.optional_non_negative("offset")?.unwrap_or(0);
    let size = args.optional_non_negative("size")?;
    Ok(DriverOptions::Raw(RawOptions { file, offset, size }))
}

pub(super) fn copy_before_write(
    args: &mut Args,
    common: &Common,
) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", common)?;
    let target = child(args, "target", common)?;
    let bitmap = match args.optional_object("bitmap")? {
        Some(mut bitmap) => {
            let names = (bitmap.required_str("node")?, bitmap.required_str("name")?);
            bitmap.finish()?;
            Some(names)
        }
        None => None,
    };
    let on_error = args.optional_enum("on-cbw-error", ON_CBW_ERROR)?;
    let timeout = args.optional_u32("cbw-timeout")?;
    Ok(DriverOptions::CopyBeforeWrite(CopyBeforeWriteOptions {
        file,
        target,
        bitmap,
        policy: cbw_policy(on_error, timeout),
    }))
}

/// The policy that the two options of `copy-before-write` make.
pub(in crate::monitor::commands) fn cbw_policy(
    on_error: Option<OnCbwError>,
    timeout: Option<u32>,
) -> CbwPolicy {
    CbwPolicy {
        on_error: on_error.unwrap_or_default(),
        timeout: timeout
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into())),
    }
}

pub(super) fn snapshot_access(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", common)?;
    Ok(DriverOptions::SnapshotAccess(SnapshotAccessOptions {
        file,
    }))
}

pub(super) fn copy_on_read(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", common)?;
    let bottom = args.optional_str("bottom")?;
    Ok(DriverOptions::CopyOnRead(CopyOnReadOptions {
        file,
        bottom,
    }))
}

pub(super) fn preallocate(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let default = PreallocateOptions::new(child(args, "file", common)?);
    Ok(DriverOptions::Preallocate(PreallocateOptions {
        align: args
            .optional_i64("prealloc-align")?
            .unwrap_or(default.align),
        size: args.optional_i64("prealloc-size")?.unwrap_or(default.size),
        ..default
    }))
}

pub(super) fn throttle(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let group = args.required_str("throttle-group")?;
    let file = child(args, "file", common)?;
    Ok(DriverOptions::Throttle(ThrottleOptions { group, file }))
}

/// `lazy-refcounts`, the sizes of caches and checks for overlaps change how QEMU
/// works, not what an image holds: they are checked and have no effect.
pub(super) fn qcow2(args: &mut Args, common: &Common) -> Result<DriverOptions, QmpError> {
    let file = child(args, "file", common)?;
    let backing = backing(args, common)?;
    let lazy_refcounts = args.optional_bool("lazy-refcounts")?.unwrap_or(false);
    let pass_discard_request = args.optional_bool("pass-discard-request")?;
    args.optional_bool("pass-discard-snapshot")?;
    args.optional_bool("pass-discard-other")?;
    overlap_check(args)?;
    let l2_cache_entry_size = qcow2_caches(args)?;
    let encrypt = match args.optional_object("encrypt")? {
        Some(args) => Some(encryption(args)?),
        None => None,
    };
    let data_file = optional_child(args, "data-file", common)?;
    Ok(DriverOptions::Qcow2(Qcow2Options {
        file,
        data_file,
        backing,
        pass_discard_request,
        lazy_refcounts,
        l2_cache_entry_size,
        encrypt,
    }))
}

fn encryption(mut args: Args) -> Result<EncryptOptions, QmpError> {
    let encrypt = EncryptOptions {
        format: args.required_enum("format", &[("aes", "aes"), ("luks", "luks")])?,
        key_secret: args.optional_str("key-secret")?,
    };
    args.finish()?;
    Ok(encrypt)
}

/// What QEMU checks writes of tables against: a word, or an object.
fn overlap_check(args: &mut Args) -> Result<(), QmpError> {
    const TEMPLATES: &[(&str, ())] = &[("none", ()), ("constant", ()), ("cached", ()), ("all", ())];
    const TABLES: [&str; 9] = [
        "main-header",
        "active-l1",
        "active-l2",
        "refcount-table",
        "refcount-block",
        "snapshot-table",
        "inactive-l1",
        "inactive-l2",
        "bitmap-directory",
    ];
    if !args.is_given("overlap-check") {
        return Ok(());
    }
    match args.required_string_or_object("overlap-check", "Qcow2OverlapChecks")? {
        StringOrObject::String(word) => {
            if !TEMPLATES.iter().any(|(template, ())| *template == word) {
                return Err(QmpError::bad_value("overlap-check", &word));
            }
            Ok(())
        }
        StringOrObject::Object(mut flags) => {
            flags.optional_enum("template", TEMPLATES)?;
            for table in TABLES {
                flags.optional_bool(table)?;
            }
            flags.finish()
        }
    }
}

/// Gives `l2-cache-entry-size`, which the image has to allow.
fn qcow2_caches(args: &mut Args) -> Result<Option<u64>, QmpError> {
    let cache = args.optional_non_negative("cache-size")?;
    let l2 = args.optional_non_negative("l2-cache-size")?;
    let entry = args.optional_non_negative("l2-cache-entry-size")?;
    let refcount = args.optional_non_negative("refcount-cache-size")?;
    let interval = args.optional_i64("cache-clean-interval")?;
    if let Some(cache) = cache {
        if l2.is_some() && refcount.is_some() {
            args.refuse(QmpError::generic(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same \
                 time",
            ));
        }
        if l2.is_some_and(|l2| l2 > cache) {
            args.refuse(QmpError::generic("l2-cache-size may not exceed cache-size"));
        }
        if refcount.is_some_and(|refcount| refcount > cache) {
            args.refuse(QmpError::generic(
                "refcount-cache-size may not exceed cache-size",
            ));
        }
    }
    if interval.is_some_and(|interval| u32::try_from(interval).is_err()) {
        args.refuse(QmpError::generic("Cache clean interval too big"));
    }
    Ok(entry)
}
