//! The embedded guest as a file, for `diptych run --kernel`.
//!
//! What the guest does is written in `resources/guest/README.md`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

/// The guest's kernel: an ELF image with a PVH entry.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// Arguments of `diptych guest`.
#[derive(Debug, clap::Args)]
pub struct GuestArgs {
    /// Where to write the guest's kernel; what is there is replaced
    #[arg(long, value_name = "PATH")]
    write: PathBuf,
}

/// Writes the embedded guest's kernel to a file.
pub fn main(args: GuestArgs) -> anyhow::Result<ExitCode> {
    fs::write(&args.write, IMAGE)
        .with_context(|| format!("Cannot write the guest to '{}'", args.write.display()))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::IMAGE;

    #[test]
    fn the_image_is_a_pvh_kernel() {
        let mut image = std::io::Cursor::new(IMAGE);
        let memory: vm_memory::GuestMemoryMmap<()> =
            vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4 << 20)])
                .unwrap();
        use linux_loader::loader::KernelLoader;
        let loaded = linux_loader::loader::Elf::load(&memory, None, &mut image, None).unwrap();
        assert!(matches!(
            loaded.pvh_boot_cap,
            linux_loader::loader::elf::PvhBootCapability::PvhEntryPresent(_)
        ));
    }
}
