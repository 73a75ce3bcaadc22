import java.nio.ByteBuffer;
import java.security.SecureRandom;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.zip.CRC32;

/** Counts, for ever: `beat <token> <counter> <checksum of 64 MiB of objects>`, with garbage made and collected in between. */
public final class Heap {
    public static void main(String[] arguments) throws InterruptedException {
        SecureRandom random = new SecureRandom();
        byte[] token = new byte[16];
        random.nextBytes(token);
        List<byte[]> held = new ArrayList<>();
        for (int i = 0; i < 64 * 16; i++) {
            byte[] block = new byte[64 << 10];
            random.nextBytes(block);
            ByteBuffer.wrap(block).putInt(i);
            held.add(block);
        }
        for (long counter = 1; ; counter++) {
            CRC32 sum = new CRC32();
            for (byte[] block : held) {
                sum.update(block.clone());
            }
            System.out.println("beat " + HexFormat.of().formatHex(token) + " " + counter + " " + sum.getValue());
            Thread.sleep(20);
        }
    }
}
