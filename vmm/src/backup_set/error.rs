//! What is wrong with a directory of backups.

use std::io;
use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// A file or directory cannot be used.
    #[error("Cannot {what} '{path}'", path = path.display())]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else is at work there.
    #[error("Another backup into '{}' is under way: wait for its end", .0.display())]
    Locked(PathBuf),
    /// There are no backups.
    #[error("'{}' holds no backups: it has no file '{}'", .0.display(), super::manifest::NAME)]
    NoManifest(PathBuf),
    /// There are none that ended well.
    #[error("'{}' holds no backups: none has ended well", .0.display())]
    Empty(PathBuf),
    /// There are files of backups, and nobody knows what they are.
    #[error(
        "'{directory}' has '{file}', which looks as a file of a backup, and no manifest '{}': put \
         that back, or give another directory",
        super::manifest::NAME,
        directory = directory.display()
    )]
    LostManifest {
        /// The directory.
        directory: PathBuf,
        /// One of the files.
        file: String,
    },
    /// Nothing more can be noted.
    #[error("The manifest '{path}' has no room for more: {why}; give another directory", path = path.display())]
    Full {
        /// Its path.
        path: PathBuf,
        /// Which bound it is at.
        why: String,
    },
    /// The manifest is not one.
    #[error("The manifest '{path}' cannot be used: {why}", path = path.display())]
    BadManifest {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A list of ranges is not one.
    #[error("The list of ranges '{path}' cannot be used: {why}", path = path.display())]
    BadRanges {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A piece is not what it was.
    #[error("'{path}' is not what the backup wrote: {why}", path = path.display())]
    BadPiece {
        /// Its path.
        path: PathBuf,
        /// How that is known.
        why: String,
    },
    /// Somebody wants it to end.
    #[error("Interrupted")]
    Interrupted,
}

impl SetError {
    /// For a `map_err` of what was to be done with `path`.
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
