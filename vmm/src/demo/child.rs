//! The process that runs the guest: `diptych run`, started by the demo.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kvm_ioctls::Kvm;

use super::images::Images;
use crate::client::Watch;
use crate::guest;

/// Memory of the guest besides its record.
const MEMORY_MIB: u64 = 64;

/// Whether the demo can run here at all. Gives the frequency of the guest's time
/// stamp counter in kHz, 0 if KVM does not tell.
///
/// Errors: no KVM, or no right to use it, with the remedy.
pub fn check_kvm() -> anyhow::Result<u32> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) if error.errno() == libc::EACCES || error.errno() == libc::EPERM => bail!(
            "No permission to use /dev/kvm; add your user to its group \
             ('sudo usermod -aG kvm $USER', then log in again)"
        ),
        Err(error) if error.errno() == libc::ENOENT => bail!(
            "There is no /dev/kvm; switch virtualisation on in the firmware and load the \
             module kvm_intel or kvm_amd (on a virtual machine: enable nested virtualisation)"
        ),
        Err(error) => return Err(error).context("Cannot open /dev/kvm"),
    };
    // Not every processor tells its guest, and then a vCPU of our own can be
    // asked: all of them are alike.
    let khz = kvm
        .create_vm()
        .and_then(|vm| vm.create_vcpu(0))
        .and_then(|vcpu| vcpu.get_tsc_khz());
    Ok(khz.unwrap_or(0))
}

/// The running process. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    process: Rc<RefCell<Child>>,
    qmp: PathBuf,
    serial: PathBuf,
    stderr: PathBuf,
}

impl Vm {
    /// Starts `diptych run` with the embedded guest on the source image and the
    /// mailbox. `workload` goes to the guest's command line.
    pub fn start(images: &Images, size: u64, workload: &str) -> anyhow::Result<Self> {
        let directory = images.directory();
        let kernel = directory.join("guest.elf");
        fs::write(&kernel, guest::IMAGE)
            .with_context(|| format!("Cannot write '{}'", kernel.display()))?;
        let qmp = directory.join("qmp");
        let serial = directory.join("serial");
        let stderr = directory.join("stderr");
        let stderr_file = File::create(&stderr)
            .with_context(|| format!("Cannot create '{}'", stderr.display()))?;
        let disk = |path: &Path, id: &str| format!("path={},id={id}", path.display());
        // The record takes 8 bytes for each block of 4 KiB.
        let memory_mib = MEMORY_MIB + (size >> 20).div_ceil(512);
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["--log-level", "warn", "run", "--kernel"])
            .arg(&kernel)
            .args(["--cmdline", workload])
            .args(["--memory", &format!("{memory_mib}M")])
            .args(["--disk", &disk(images.source(), "vda")])
            .args(["--disk", &disk(images.mailbox(), "mailbox")])
            .arg("--qmp")
            .arg(format!("unix:{}", qmp.display()))
            .arg("--serial")
            .arg(format!("file:{}", serial.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr_file)
            // A Ctrl-C is for the demo, which then ends the guest.
            .process_group(0);
        // SAFETY: prctl is a plain system call: it takes no lock and allocates
        // nothing, so it may run between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // Whatever becomes of the demo, the guest does not outlive it.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
        let process = command.spawn().context("Cannot start 'diptych run'")?;
        Ok(Self {
            process: Rc::new(RefCell::new(process)),
            qmp,
            serial,
            stderr,
        })
    }

    /// The socket of its monitor, once it is there.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }

    /// What ends waits: the process has ended, or the demo was interrupted.
    pub fn watch(&self, interrupted: &Arc<AtomicBool>) -> VmWatch {
        VmWatch {
            process: Rc::clone(&self.process),
            stderr: self.stderr.clone(),
            interrupted: Arc::clone(interrupted),
        }
    }

    /// Waits for the process to end by itself; `None` if it does not within
    /// `patience`, or the demo is interrupted.
    pub fn wait(
        &self,
        patience: Duration,
        interrupted: &AtomicBool,
    ) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.process.borrow_mut().try_wait()?;
            let is_over = Instant::now() >= deadline || interrupted.load(Ordering::Relaxed);
            if status.is_some() || is_over {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the guest has said on its serial port.
    pub fn serial(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.serial)?).into_owned())
    }

    /// What the process said, for an error: its last line, or how it ended.
    pub fn last_words(&self, status: ExitStatus) -> String {
        last_words(&self.stderr, status)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let mut process = self.process.borrow_mut();
        // Both fail only if it has ended already.
        let _ = process.kill();
        let _ = process.wait();
    }
}

/// See [`Vm::watch`].
#[derive(Debug)]
pub struct VmWatch {
    process: Rc<RefCell<Child>>,
    stderr: PathBuf,
    interrupted: Arc<AtomicBool>,
}

impl Watch for VmWatch {
    fn check(&mut self) -> Result<(), String> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err("Interrupted".into());
        }
        match self.process.borrow_mut().try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!(
                "The guest ended too early: {}",
                last_words(&self.stderr, status)
            )),
            Err(error) => Err(format!("Cannot watch 'diptych run': {error}")),
        }
    }
}

fn last_words(stderr: &Path, status: ExitStatus) -> String {
    let text = fs::read(stderr).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => line.trim_start_matches("diptych: ").to_owned(),
        None => match status.signal() {
            Some(signal) => format!("'diptych run' was ended by signal {signal}"),
            None => format!("'diptych run' ended with {status}"),
        },
    }
}
