//! Which backing files the header of an image may name.
//!
//! A header is as little to be trusted as the rest of an image: whoever made it
//! could name any file that we can read, and have the guest read it. So a name is
//! followed to regular files only that are, symbolic links resolved, in the
//! directory of the image that names them, or below it, or below a directory that
//! the user allows.

use std::fs;
use std::path::{Path, PathBuf};

/// Why a backing file that a header names is not opened.
#[derive(Debug, thiserror::Error)]
pub enum BackingFileError {
    /// The name is one of a protocol, or of options.
    #[error(
        "The image names '{name}' as its backing file, and only files are opened by such a name: \
         give 'backing' explicitly"
    )]
    NotAFile {
        /// As it is in the header.
        name: String,
    },
    /// The file is somewhere else.
    #[error(
        "The image names '{name}' as its backing file, which is outside of the image's directory: \
         give 'backing' explicitly, or allow its directory with '--backing-directory'"
    )]
    Outside {
        /// As it is in the header.
        name: String,
    },
    /// A device, a directory, …
    #[error(
        "The image names '{name}' as its backing file, which is not a regular file: give \
         'backing' explicitly"
    )]
    NotRegular {
        /// As it is in the header.
        name: String,
    },
    /// The image is not a file by itself, so its directory is not known.
    #[error(
        "The image names '{name}' as its backing file, and is not in a local file itself: give \
         'backing' explicitly"
    )]
    NoDirectory {
        /// As it is in the header.
        name: String,
    },
    /// The file is a layer above itself.
    #[error("The image names '{name}' as its backing file, which is one of the images above it")]
    Loop {
        /// As it is in the header.
        name: String,
    },
    /// The format is not one that is opened by a header.
    #[error(
        "The image says that its backing file '{name}' is of format '{format}', which is not \
         supported: give 'backing' explicitly"
    )]
    Format {
        /// As it is in the header.
        name: String,
        /// As it is in the header.
        format: String,
    },
    /// The file cannot be found.
    #[error("Could not open '{}': {}", path.display(), crate::error::os_text(error))]
    Find {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        error: std::io::Error,
    },
}

/// The file that `name` in the header of `image` stands for, without symbolic
/// links. `allowed`: directories that may hold it besides the image's own. `above`:
/// files that were opened by names in headers on the way to it.
///
/// Looks at the file system: not on a loop.
pub(crate) fn resolve(
    name: &str,
    image: &Path,
    allowed: &[PathBuf],
    above: &[PathBuf],
) -> Result<PathBuf, BackingFileError> {
    let owned = || name.to_owned();
    let path = name.strip_prefix("file:").unwrap_or(name);
    let protocol = path
        .split('/')
        .next()
        .is_some_and(|first| first.contains(':'));
    if protocol || path.is_empty() || path.contains('\0') {
        return Err(BackingFileError::NotAFile { name: owned() });
    }
    let directory = match image.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(BackingFileError::NoDirectory { name: owned() }),
    };
    // Absolute names replace the directory.
    let path = directory.join(path);
    let find = |path: &Path| {
        fs::canonicalize(path).map_err(|error| BackingFileError::Find {
            path: path.to_owned(),
            error,
        })
    };
    let found = find(&path)?;
    let own = find(directory)?;
    let inside = found.starts_with(&own)
        || allowed
            .iter()
            .filter_map(|directory| fs::canonicalize(directory).ok())
            .any(|directory| found.starts_with(directory));
    if !inside {
        return Err(BackingFileError::Outside { name: owned() });
    }
    let regular = fs::metadata(&found)
        .map_err(|error| BackingFileError::Find {
            path: found.clone(),
            error,
        })?
        .is_file();
    if !regular {
        return Err(BackingFileError::NotRegular { name: owned() });
    }
    if above.contains(&found) || fs::canonicalize(image).is_ok_and(|image| image == found) {
        return Err(BackingFileError::Loop { name: owned() });
    }
    Ok(found)
}
