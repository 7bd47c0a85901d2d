"""diptych at a terminal: its commands, and giving the terminal back."""
import os
import pty
import subprocess
import termios
import time

from support.program import BINARY, PATIENCE


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_ctrl_a_x_ends_it_though_the_guest_reads_nothing(kvm, tmp_path):
    kernel = tmp_path / "kernel"
    subprocess.run([BINARY, "guest", "--write", kernel], check=True, timeout=PATIENCE)
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([BINARY, "run", "--kernel", kernel, "--paused"],
                               stdin=slave, stdout=slave, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON, "no raw mode")
        # More than the port holds, in pieces that the terminal takes.
        for _ in range(20):
            os.write(master, b"x" * 15)
        os.write(master, b"\x01x")
        error = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, error
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_terminal_is_given_back_at_a_signal(kvm, tmp_path):
    kernel = tmp_path / "kernel"
    subprocess.run([BINARY, "guest", "--write", kernel], check=True, timeout=PATIENCE)
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([BINARY, "run", "--kernel", kernel, "--paused"],
                               stdin=slave, stdout=slave, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON, "no raw mode")
        process.terminate()
        assert process.wait(PATIENCE) == 128 + 15
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
