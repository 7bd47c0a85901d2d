//! Opening: kind of file, rights, O_DIRECT, size and alignment.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::sys::{self, DirectAlignment};
use crate::buffer::AlignedBuffer;
use crate::drivers::OpenError;
use crate::options::FileOptions;

/// What is behind the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Device {
        /// Logical sector size in bytes.
        sector: u32,
    },
}

/// A file as it was found.
#[derive(Debug)]
pub(super) struct Opened {
    pub file: File,
    pub kind: Kind,
    pub read_only: bool,
    /// Bytes.
    pub size: u64,
    /// `None` without O_DIRECT.
    pub direct: Option<DirectAlignment>,
}

fn is_image(kind: std::fs::FileType) -> bool {
    kind.is_file() || kind.is_block_device()
}

fn open_as(path: &Path, writable: bool, direct: bool) -> io::Result<File> {
    let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY;
    if direct {
        flags |= libc::O_DIRECT;
    }
    File::options()
        .read(true)
        .write(writable)
        .custom_flags(flags)
        .open(path)
}

/// Opens the file. May block for long, on a dead file server for ever.
pub(super) fn open(
    options: &FileOptions,
    read_only: bool,
    auto_read_only: bool,
    direct: bool,
) -> Result<Opened, OpenError> {
    let path = &options.filename;
    let failed = |error: io::Error| OpenError::Open {
        path: path.clone(),
        error,
    };
    // Looked at first, since opening a FIFO waits for its other end.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_dir() && !read_only {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    check_kind(options, kind)?;
    let open = |writable: bool| match open_as(path, writable, direct) {
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            Err(OpenError::NotSupported {
                path: path.clone(),
                what: "O_DIRECT",
                remedy: "use cache.direct=off",
            })
        }
        result => result.map_err(failed),
    };
    let (file, read_only) = match open(!read_only) {
        Err(OpenError::Open { error, .. })
            if !read_only
                && auto_read_only
                && matches!(
                    error.raw_os_error(),
                    Some(libc::EACCES | libc::EROFS | libc::EPERM)
                ) =>
        {
            (open(false)?, true)
        }
        result => (result?, read_only),
    };
    // Somebody may have put something else there meanwhile.
    let metadata = file.metadata().map_err(failed)?;
    check_kind(options, metadata.file_type())?;
    let probe = |what: &'static str| {
        move |source: io::Error| OpenError::Probe {
            path: path.clone(),
            what,
            source,
        }
    };
    let (kind, size, read_only) = if metadata.file_type().is_block_device() {
        let device_read_only =
            sys::device_read_only(&file).map_err(probe("the write protection"))?;
        if device_read_only && !read_only && !auto_read_only {
            return Err(failed(io::Error::from_raw_os_error(libc::EACCES)));
        }
        let sector = sys::sector_size(&file).map_err(probe("the sector size"))?;
        let size = sys::device_size(&file).map_err(probe("the size"))?;
        let sector = sector.max(1).next_power_of_two();
        (Kind::Device { sector }, size, read_only || device_read_only)
    } else {
        (Kind::Regular, metadata.len(), read_only)
    };
    let direct = direct
        .then(|| alignment(&file, kind, size).map_err(probe("the alignment for O_DIRECT")))
        .transpose()?;
    Ok(Opened {
        file,
        kind,
        read_only,
        size,
        direct,
    })
}

fn check_kind(options: &FileOptions, kind: std::fs::FileType) -> Result<(), OpenError> {
    let path = &options.filename;
    if !is_image(kind) {
        return Err(OpenError::WrongKind { path: path.clone() });
    }
    if options.host_device && !kind.is_block_device() {
        return Err(OpenError::NotADevice { path: path.clone() });
    }
    Ok(())
}

/// Smallest unit of requests that nodes know.
const SECTOR: u32 = 512;

/// What O_DIRECT wants: asked, or tried out.
fn alignment(file: &File, kind: Kind, size: u64) -> io::Result<DirectAlignment> {
    let smallest = match kind {
        Kind::Device { sector } => sector.max(SECTOR),
        Kind::Regular => SECTOR,
    };
    let found = match sys::direct_alignment(file) {
        // Zero: the file system takes O_DIRECT only to ignore it.
        Some(found) if found.memory > 0 && found.request > 0 => found,
        _ => try_alignment(file, smallest, size)?,
    };
    let usable = |value: u32| value.is_power_of_two() && value as usize <= MAX_ALIGNMENT;
    if !usable(found.memory) || !usable(found.request) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(DirectAlignment {
        memory: found.memory,
        request: found.request.max(smallest),
    })
}

/// Buffers of ours have this alignment.
const MAX_ALIGNMENT: usize = AlignedBuffer::ALIGNMENT;

/// Reads until the kernel is content. `size` is the file's.
pub(super) fn try_alignment(file: &File, smallest: u32, size: u64) -> io::Result<DirectAlignment> {
    let mut memory = vec![0u8; 3 * MAX_ALIGNMENT];
    let aligned = memory.as_ptr().align_offset(MAX_ALIGNMENT);
    let sizes = || std::iter::successors(Some(smallest as usize), |size| Some(size * 2));
    let mut fits =
        |skip: usize, len: usize| match sys::probe_read(file, &mut memory, aligned + skip, len) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        };
    if fits(0, 1)? {
        // Nobody looks at reads here (of a hole, in some file systems), so they
        // tell nothing of writes. The largest fits all; but a file that does not
        // end with such a block could not be written then.
        let whole = size.is_multiple_of(MAX_ALIGNMENT as u64);
        return Ok(DirectAlignment {
            memory: MAX_ALIGNMENT as u32,
            request: if whole {
                MAX_ALIGNMENT as u32
            } else {
                smallest
            },
        });
    }
    let unfit = || io::Error::from_raw_os_error(libc::EINVAL);
    let mut request = None;
    for len in sizes().take_while(|size| *size <= MAX_ALIGNMENT) {
        if fits(0, len)? {
            request = Some(len);
            break;
        }
    }
    let request = request.ok_or_else(unfit)?;
    // Kernels that have to be tried out want segments of whole blocks, too.
    let mut memory_alignment = MAX_ALIGNMENT;
    for skip in sizes().take_while(|size| *size < MAX_ALIGNMENT) {
        if skip >= request && fits(skip, request)? {
            memory_alignment = skip;
            break;
        }
    }
    // Both are at most MAX_ALIGNMENT.
    Ok(DirectAlignment {
        memory: memory_alignment as u32,
        request: request as u32,
    })
}
