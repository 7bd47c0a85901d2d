//! The demo's files: made new, and removed in the end.
//!
//! No data of a user is ever overwritten: a path that is named must be free,
//! or hold an empty file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use guest::mailbox::MAILBOX_BYTES;
use tempfile::TempDir;

/// Why the files cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// There is something already.
    #[error(
        "'{path}' holds data already; name a path where nothing is, or an empty file",
        path = path.display()
    )]
    HoldsData {
        /// The file.
        path: PathBuf,
    },
    /// The place beside the disk is taken.
    #[error(
        "'{path}', where the mirror would go, exists already; move it away or use another --disk",
        path = path.display()
    )]
    TargetExists {
        /// The file.
        path: PathBuf,
    },
    /// The file system refuses.
    #[error("Cannot create '{path}'", path = path.display())]
    Create {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The files of one run. Dropping it removes them, unless they are kept.
#[derive(Debug)]
pub struct Images {
    directory: TempDir,
    source: PathBuf,
    target: PathBuf,
    mailbox: PathBuf,
    /// Files outside of the directory that this run has made, or filled.
    outside: Vec<Outside>,
    keep: bool,
}

#[derive(Debug)]
struct Outside {
    path: PathBuf,
    /// The file was there before, and empty.
    was_empty: bool,
}

impl Images {
    /// Makes sparse images of `size` bytes, and the mailbox.
    ///
    /// Errors: a named file holds data; the file system refuses. What was made
    /// until then is removed.
    pub fn create(disk: Option<&Path>, size: u64, keep: bool) -> Result<Self, ImagesError> {
        let directory = tempfile::Builder::new()
            .prefix("diptych-demo-")
            .tempdir()
            .map_err(|source| ImagesError::Create {
                path: std::env::temp_dir(),
                source,
            })?;
        let (source, target) = match disk {
            Some(disk) => {
                let mut target = disk.as_os_str().to_owned();
                target.push(".mirror");
                (disk.to_owned(), PathBuf::from(target))
            }
            None => (
                directory.path().join("source.raw"),
                directory.path().join("target.raw"),
            ),
        };
        let mut images = Self {
            mailbox: directory.path().join("mailbox.raw"),
            directory,
            source,
            target,
            outside: Vec::new(),
            keep: false,
        };
        if disk.is_some() {
            images.claim_outside()?;
        }
        for (path, size) in [
            (&images.source, size),
            (&images.target, size),
            (&images.mailbox, MAILBOX_BYTES),
        ] {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .and_then(|file| file.set_len(size))
                .map_err(|source| ImagesError::Create {
                    path: path.clone(),
                    source,
                })?;
        }
        // Only a complete set is kept.
        images.keep = keep;
        Ok(images)
    }

    /// Takes the named places, if nothing is lost by that.
    fn claim_outside(&mut self) -> Result<(), ImagesError> {
        let was_empty = match fs::metadata(&self.source) {
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => true,
            Ok(_) => {
                return Err(ImagesError::HoldsData {
                    path: self.source.clone(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create_new(&self.source)?;
                false
            }
            Err(source) => {
                return Err(ImagesError::Create {
                    path: self.source.clone(),
                    source,
                });
            }
        };
        self.outside.push(Outside {
            path: self.source.clone(),
            was_empty,
        });
        create_new(&self.target).map_err(|error| match error {
            ImagesError::Create { path, source }
                if source.kind() == io::ErrorKind::AlreadyExists =>
            {
                ImagesError::TargetExists { path }
            }
            error => error,
        })?;
        self.outside.push(Outside {
            path: self.target.clone(),
            was_empty: false,
        });
        Ok(())
    }

    /// A private directory for sockets and the like.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The disk that the guest begins on.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The disk that it ends on.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The disk behind the mailbox.
    pub fn mailbox(&self) -> &Path {
        &self.mailbox
    }

    /// Whether the images stay.
    pub fn are_kept(&self) -> bool {
        self.keep
    }
}

fn create_new(path: &Path) -> Result<File, ImagesError> {
    File::create_new(path).map_err(|source| ImagesError::Create {
        path: path.to_owned(),
        source,
    })
}

impl Drop for Images {
    fn drop(&mut self) {
        if self.keep {
            if self.outside.is_empty() {
                self.directory.disable_cleanup(true);
                // The images stay; nothing else is of use any more.
                let entries = fs::read_dir(self.directory.path()).into_iter().flatten();
                for path in entries.flatten().map(|entry| entry.path()) {
                    if path != self.source && path != self.target {
                        let _ = fs::remove_file(path);
                    }
                }
            }
            return;
        }
        for file in &self.outside {
            // Nothing can be done about a file that does not go.
            let _ = if file.was_empty {
                OpenOptions::new()
                    .write(true)
                    .open(&file.path)
                    .and_then(|file| file.set_len(0))
            } else {
                fs::remove_file(&file.path)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_with_data_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        fs::write(&disk, "precious").unwrap();
        let error = Images::create(Some(&disk), SIZE, false).unwrap_err();
        assert!(matches!(error, ImagesError::HoldsData { .. }), "{error}");
        assert_eq!(fs::read(&disk).unwrap(), b"precious");
        assert_eq!(names(directory.path()), ["disk"]);
    }

    #[test]
    fn a_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = Images::create(Some(directory.path()), SIZE, false).unwrap_err();
        assert!(matches!(error, ImagesError::HoldsData { .. }), "{error}");
    }

    #[test]
    fn a_taken_target_is_refused_and_the_source_is_not_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("disk.mirror");
        fs::write(&target, "precious").unwrap();
        let disk = directory.path().join("disk");
        let error = Images::create(Some(&disk), SIZE, true).unwrap_err();
        assert!(matches!(error, ImagesError::TargetExists { .. }), "{error}");
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert_eq!(names(directory.path()), ["disk.mirror"]);
    }

    #[test]
    fn an_empty_file_is_used_and_empty_again_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        fs::write(&disk, "").unwrap();
        let images = Images::create(Some(&disk), SIZE, false).unwrap();
        assert_eq!(fs::metadata(images.target()).unwrap().len(), SIZE);
        drop(images);
        assert_eq!(names(directory.path()), ["disk"]);
        assert_eq!(fs::metadata(&disk).unwrap().len(), 0);
    }

    #[test]
    fn kept_images_stay_and_nothing_else_does() {
        let images = Images::create(None, SIZE, true).unwrap();
        let directory = images.directory().to_owned();
        drop(images);
        assert_eq!(names(&directory), ["source.raw", "target.raw"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn without_keep_everything_goes() {
        let images = Images::create(None, SIZE, false).unwrap();
        let directory = images.directory().to_owned();
        drop(images);
        assert!(!directory.exists());
    }
}
