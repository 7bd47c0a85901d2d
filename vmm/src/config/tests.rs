use super::*;
use clap::Parser;
use std::io::Write;

use crate::run::RunArgs;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
}

fn flags(words: &[&str]) -> VmSpec {
    Cli::try_parse_from([&["run"], words].concat())
        .unwrap()
        .run
        .into_spec()
        .unwrap()
}

fn file(ending: &str, text: &str) -> (tempfile::TempPath, Result<VmSpec, ConfigError>) {
    let mut file = tempfile::Builder::new().suffix(ending).tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let path = file.into_temp_path();
    let spec = VmSpec::read(&path);
    (path, spec)
}

const FLAGS: &[&str] = &[
    "--kernel",
    "vmlinux",
    "--initrd",
    "rd.cpio",
    "--cmdline",
    "console=ttyS0 quiet",
    "--boot",
    "linux64",
    "--cpus",
    "4",
    "--memory",
    "2G",
    "--disk",
    "path=a.raw,id=vda,readonly=on,direct=on,discard=off,serial=S1,queues=4,iothread=io0+io1",
    "--disk",
    "path=b,,c.raw",
    "--iothread",
    "id=io0",
    "--iothread",
    "id=io1",
    "--qmp",
    "unix:/run/q1",
    "--qmp",
    "unix:/run/q2",
    "--serial",
    "file:out",
    "--paused",
    "--on-reboot",
    "reset",
    "--on-crash",
    "exit",
];

const TOML: &str = r#"
kernel = "vmlinux"
initrd = "rd.cpio"
cmdline = "console=ttyS0 quiet"
boot = "linux64"
cpus = 4
memory = "2G"
qmp = ["unix:/run/q1", "unix:/run/q2"]
serial = "file:out"
paused = true
on-reboot = "reset"
on-crash = "exit"

[[disk]]
path = "a.raw"
id = "vda"
readonly = true
direct = true
discard = false
serial = "S1"
queues = 4
iothread = ["io0", "io1"]

[[disk]]
path = "b,c.raw"

[[iothread]]
id = "io0"

[[iothread]]
id = "io1"
"#;

const JSON: &str = r#"{
"kernel": "vmlinux", "initrd": "rd.cpio", "cmdline": "console=ttyS0 quiet",
"boot": "linux64", "cpus": 4, "memory": 2048,
"disk": [{"path": "a.raw", "id": "vda", "readonly": "on", "direct": "on", "discard": "off",
          "serial": "S1", "queues": "4", "iothread": "io0+io1"},
         {"path": "b,c.raw"}],
"iothread": [{"id": "io0"}, {"id": "io1"}],
"qmp": ["unix:/run/q1", "unix:/run/q2"], "serial": "file:out", "paused": true,
"on-reboot": "reset", "on-crash": "exit"}"#;

#[test]
fn flags_toml_and_json_say_the_same_things() {
    let spec = flags(FLAGS);
    assert_eq!(file(".toml", TOML).1.unwrap(), spec);
    assert_eq!(file(".json", JSON).1.unwrap(), spec);
    assert_eq!(spec.memory, Some(MemorySize(2 * crate::machine::GIB)));
    assert_eq!(spec.disk[1].path.as_deref(), Some(Path::new("b,c.raw")));
    assert_eq!(spec.disk[0].iothread, ["io0", "io1"]);
}

#[test]
fn flags_override_single_values_of_a_file_and_add_to_its_lists() {
    let (path, _) = file(".toml", TOML);
    let spec = flags(&[
        "--config",
        path.to_str().unwrap(),
        "--cpus",
        "2",
        "--disk",
        "path=c.raw",
    ]);
    assert_eq!(spec.cpus, Some(2));
    assert_eq!(spec.kernel.as_deref(), Some(Path::new("vmlinux")));
    assert_eq!(spec.disk.len(), 3);
    assert_eq!(spec.disk[2].path.as_deref(), Some(Path::new("c.raw")));
}

#[test]
fn an_unknown_key_is_refused_with_its_place() {
    for (ending, text, place) in [
        (".toml", "kernel = \"k\"\ncpu = 1\n", "line 2, column 1"),
        (
            ".toml",
            "[[disk]]\npath = \"p\"\nfast = true\n",
            "line 3, column 1",
        ),
        (
            ".json",
            "{\"kernel\": \"k\",\n \"cpu\": 1}",
            "line 2, column 6",
        ),
        (".toml", "memory = \"12Q\"\n", "line 1, column 10"),
        (".toml", "kernel = \n", "line 1"),
    ] {
        let message = file(ending, text).1.unwrap_err().to_string();
        assert!(message.contains(place), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn bad_flags_are_usage_errors_that_name_the_key() {
    for (words, part) in [
        (&["--disk", "path=a,format=vmdk"][..], "vmdk"),
        (&["--blockdev", "driver=null-co"], "node-name"),
        (&["--object", "no,id=x"], "'no'"),
        (&["--disk", "path=a,path=b"], "twice"),
        (&["--disk", "path=a,fast=on"], "fast"),
        (&["--disk", "path=a,readonly=maybe"], "on or off"),
        (&["--disk", "path=a,queues=many"], "number"),
        (&["--disk", "a.raw"], "key=value"),
        (&["--memory", "12Q"], "size"),
        (&["--qmp", "/run/q"], "unix:PATH"),
        (&["--serial", "tty"], "stdio"),
        (&["--cpus", "lots"], "cpus"),
        (&["--cpus", "0"], "1..=32"),
        (&["--cpus", "33"], "1..=32"),
        (&["--disk", "path=a,iothread="], "several as in a+b"),
        (&["--disk", "path=a,iothread=a++b"], "several as in a+b"),
        (&["--disk", "path=a,iothread=a+a"], "'a' is given twice"),
    ] {
        let error = Cli::try_parse_from([&["run", "--kernel", "k"], words].concat()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn nodes_are_said_as_to_the_monitor_and_disks_may_be_nodes() {
    let by_flags = flags(&[
        "--object",
        "throttle-group,id=slow,x-iops-total=10",
        "--blockdev",
        "driver=qcow2,node-name=image,file.driver=file,file.filename=a.qcow2",
        "--blockdev",
        r#"{"driver": "throttle", "node-name": "limited", "throttle-group": "slow", "file": "image"}"#,
        "--disk",
        "node=limited,id=root",
        "--disk",
        "path=b.qcow2,format=qcow2,bitmaps=b.marks",
    ]);
    let toml = r#"
        [[object]]
        qom-type = "throttle-group"
        id = "slow"
        x-iops-total = 10
        [[blockdev]]
        driver = "qcow2"
        node-name = "image"
        file = { driver = "file", filename = "a.qcow2" }
        [[blockdev]]
        driver = "throttle"
        node-name = "limited"
        throttle-group = "slow"
        file = "image"
        [[disk]]
        node = "limited"
        id = "root"
        [[disk]]
        path = "b.qcow2"
        format = "qcow2"
        bitmaps = "b.marks"
    "#;
    assert_eq!(file(".toml", toml).1.unwrap(), by_flags);
    assert_eq!(by_flags.blockdev.len(), 2);
    assert_eq!(by_flags.disk[1].format, Some(ImageFormat::Qcow2));
}

#[test]
fn a_disk_is_one_thing_and_a_node_is_told_nothing_twice() {
    for (disk, part) in [
        ("id=a", "either an image or a node"),
        ("path=p,node=n", "either an image or a node"),
        ("node=n,format=raw", "leave out format"),
        ("node=n,bitmaps=b", "leave out bitmaps"),
        ("node=n,direct=on", "leave out direct"),
    ] {
        let error = flags(&["--kernel", "k", "--disk", disk])
            .check()
            .unwrap_err();
        assert!(error.is_usage());
        assert!(error.to_string().contains(part), "{error}");
    }
    for (text, part) in [
        ("[[blockdev]]\ndriver = \"null-co\"\n", "node-name"),
        ("[[blockdev]]\ndriver = \"no\"\nnode-name = \"n\"\n", "'no'"),
        ("[[object]]\nqom-type = \"no\"\nid = \"n\"\n", "'no'"),
        ("blockdev = 1\n", "a list of nodes"),
    ] {
        let message = file(".toml", text).1.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn sizes_are_mib_or_have_a_unit() {
    for (text, bytes) in [
        ("512", 512 << 20),
        ("512M", 512 << 20),
        ("4096K", 4 << 20),
        ("3G", 3 << 30),
        ("3GiB", 3 << 30),
        ("1T", 1 << 40),
    ] {
        assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
    }
    for text in [
        "",
        "M",
        "-1",
        "+1",
        "1.5G",
        "1 G",
        "0x10",
        "99999999999999T",
        "1Gi",
        "G1",
    ] {
        assert!(text.parse::<MemorySize>().is_err(), "{text}");
    }
}

#[test]
fn a_checked_spec_has_ids_and_iothreads_for_all_disks() {
    let mut spec = flags(&["--kernel", "k", "--disk", "path=a", "--disk", "path=b,id=x"]);
    spec.check().unwrap();
    assert_eq!(spec.disk[0].id.as_deref(), Some("disk0"));
    assert_eq!(spec.disk[1].iothread, [DEFAULT_IOTHREAD]);
    assert_eq!(spec.iothread.len(), 1);
}

#[test]
fn contradictions_are_found_before_anything_is_opened() {
    let message = |words: &[&str]| flags(words).check().unwrap_err().to_string();
    assert!(message(&[]).contains("--kernel"));
    let k = ["--kernel", "k"];
    for (words, part) in [
        (&["--memory", "0"][..], "--memory"),
        (&["--memory", "1025K"], "whole MiB"),
        (&["--memory", "100T"], "--memory"),
        (
            &["--disk", "path=a,id=x", "--disk", "path=b,id=x"],
            "Two disks have the id 'x'",
        ),
        (
            &["--disk", "path=a,id=disk1", "--disk", "path=b"],
            "Two disks have the id 'disk1'",
        ),
        (
            &["--iothread", "id=a", "--iothread", "id=a"],
            "Two iothreads",
        ),
        (&["--disk", "path=a,iothread=io9"], "--iothread id=io9"),
        (&["--disk", "path=a,id=0x"], "Bad id '0x'"),
        (&["--disk", "path=a,queues=0"], "1 to 64"),
        (
            &["--disk", "path=a,serial=012345678901234567890"],
            "Serial number",
        ),
    ] {
        let text = message(&[&k, words].concat());
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_value_of_the_wrong_kind_is_refused_with_what_it_should_be() {
    for (json, toml, part) in [
        ("\"disk\": \"path=d\"", "disk = 'path=d'", "a list of disks"),
        (
            "\"iothread\": \"a\"",
            "iothread = 'a'",
            "a list of iothreads",
        ),
        (
            "\"qmp\": \"unix:/q\"",
            "qmp = 'unix:/q'",
            "a list of addresses",
        ),
        ("\"cpus\": 300", "cpus = 300", "1 to 32"),
        ("\"cpus\": 0", "cpus = 0", "1 to 32"),
        ("\"cpus\": -1", "cpus = -1", "1 to 32"),
        (
            "\"disk\": [{\"path\": \"d\", \"iothread\": [\"\"]}]",
            "disk = [{path = 'd', iothread = ['']}]",
            "several as in a+b",
        ),
    ] {
        for (ending, text) in [(".json", format!("{{{json}}}")), (".toml", toml.to_owned())] {
            let error = file(ending, &text).1.unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert!(error.is_usage());
        }
    }
    let missing = VmSpec::read(Path::new("/no/such/file.toml")).unwrap_err();
    assert!(!missing.is_usage());
}

#[test]
fn the_sample_files_are_right_and_say_the_same() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/config");
    let mut toml = VmSpec::read(&folder.join("guest.toml")).unwrap();
    assert_eq!(VmSpec::read(&folder.join("guest.json")).unwrap(), toml);
    toml.check().unwrap();
}

#[test]
fn the_help_of_a_disk_names_every_key() {
    for key in [
        "path", "id", "readonly", "direct", "discard", "serial", "queues", "iothread",
    ] {
        assert!(DiskSpec::HELP.contains(&format!("  {key}: ")), "{key}");
    }
}
