//! `--pidfile`: a file with the number of the process, as long as it runs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;

use rustix::fs::{FlockOperation, fcntl_lock};

/// What is longer is no pidfile, but a slip of who typed its name. An image, say.
const LEN_MAX: u64 = 64;

/// Why there is no such file.
#[derive(Debug, thiserror::Error)]
pub(super) enum PidfileError {
    /// Another process has it.
    #[error("Pidfile '{}' belongs to a process that runs (pid {}); stop that, or give another path", .path.display(), .pid)]
    InUse {
        /// The file.
        path: PathBuf,
        /// What is in it.
        pid: String,
    },
    /// Something that nobody would want to lose.
    #[error(
        "'{}' exists, and is too long to be a pidfile; remove it, or give another path",
        .path.display()
    )]
    SomethingElse {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("Cannot write pidfile '{}'", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The file; dropping it removes it. It is locked (`fcntl`) as long as the process
/// runs, so that one left behind by a crash is told from a living process.
#[derive(Debug)]
pub(super) struct Pidfile {
    /// Holds the lock. Never closed before the file is gone.
    file: File,
    /// Absolute: the process may go elsewhere.
    path: PathBuf,
}

impl Pidfile {
    /// Writes this process' number.
    pub(super) fn write(path: &Path) -> Result<Self, PidfileError> {
        let failed = |source| PidfileError::Write {
            path: path.to_owned(),
            source,
        };
        let absolute = std::path::absolute(path).map_err(failed)?;
        let mut file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&absolute)
                .map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            if !metadata.is_file() {
                return Err(failed(io::Error::other("It is not a regular file")));
            }
            if metadata.len() > LEN_MAX {
                return Err(PidfileError::SomethingElse {
                    path: path.to_owned(),
                });
            }
            match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if same_file(&file, &absolute) => break file,
                // Its owner has ended, and removed it, just now.
                Ok(()) => continue,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => {
                    return Err(in_use(path, &absolute));
                }
                Err(error) => return Err(failed(error.into())),
            }
        };
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", process::id()))
            .map_err(failed)?;
        Ok(Self {
            file,
            path: absolute,
        })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if same_file(&self.file, &self.path) {
            // It may be removed by hand just now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn in_use(path: &Path, absolute: &Path) -> PidfileError {
    let text = fs::read_to_string(absolute).unwrap_or_default();
    let pid: String = text.chars().take_while(char::is_ascii_digit).collect();
    PidfileError::InUse {
        path: path.to_owned(),
        pid: if pid.is_empty() {
            "unknown".to_owned()
        } else {
            pid
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_the_number_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        fs::write(&path, "99999999 left behind by a crash").unwrap();
        let pidfile = Pidfile::write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", process::id()));
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_took_its_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let pidfile = Pidfile::write(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(pidfile);
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
    }

    #[test]
    fn what_is_no_file_of_ours_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        fs::write(&data, "precious").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&data, &link).unwrap();
        assert!(Pidfile::write(&link).is_err());
        assert_eq!(fs::read_to_string(&data).unwrap(), "precious");
        assert!(Pidfile::write(folder.path()).is_err());
        let image = folder.path().join("image");
        fs::write(&image, [7; 512]).unwrap();
        let error = Pidfile::write(&image).unwrap_err();
        assert!(
            matches!(error, PidfileError::SomethingElse { .. }),
            "{error}"
        );
        assert_eq!(fs::read(&image).unwrap(), [7; 512]);
        assert!(Pidfile::write(&folder.path().join("none/pid")).is_err());
    }
}
